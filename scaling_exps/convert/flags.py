"""Command lines: `torchrun --nproc_per_node=4 train.py --lr 1e-3 model.optim.betas=[0.9,0.95]`, alone or in a script.

Words end where a shell ends them, and shlex reads each; `#` comments are never touched. Flags that stand in a variable
or an array of the script are read there, and `$NAME` is read, and written, where the script sets NAME.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from scaling_exps.convert.documents import Document, Odd, Path, dotted, number, spell
from scaling_exps.rules import RuleError

_TOKEN = re.compile(
    r"""(?P<gap>[ \t\r]+|\\\r?\n)|(?P<comment>\#[^\n]*)|(?P<end>\n|[;&|()<>]+)
    |(?P<word>(?:\\.|\$\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\)|\$\{[^}\n]*\}|"(?:\\.|[^"\\])*"|'[^']*'|[^\s"'\\;&|()<>])+)
    |(?P<bad>.)""",
    re.X | re.S,
)
_SHORT = {"-b": "batch_size", "-j": "workers"}
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?$")
_ASSIGN = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", re.S)

Span = tuple[int, int]


class Flags(Document):
    syntax = "flags"

    def parse(self) -> None:
        self._set: dict[str, list[tuple[str, Span]]] = {}  # what the script assigns to a variable, and where
        self._group: dict[Path, int] = {}  # which command, array or string a flag stands in
        self._ends: dict[int, int] = {}  # where the last word of each ends
        self._overrides: set[Path] = set()
        self._equals = self._dashes = self._scores = self._groups = 0
        self._raw: dict[Path, list[tuple[str, Span]]] = {}
        self._scan(self.text, 0)
        for path, words in self._raw.items():
            self._finish(path, words)
        if not self.values:
            raise RuleError(
                f"{self.where} holds no flags: expected something like `--opt adamw --lr 1e-3 --batch-size 128`"
            )

    def _scan(self, text: str, base: int) -> None:
        self._groups += 1
        group, depth, first = self._groups, 0, True
        current: Path | None = None
        for token in _TOKEN.finditer(text):
            word, start, end = token[0], base + token.start(), base + token.end()
            if token.lastgroup == "bad":
                raise self.error(f"a quote that does not end, at character {start}")
            if token.lastgroup in ("gap", "comment"):
                continue
            if token.lastgroup == "end":
                depth = max(0, depth + word.count("(") - word.count(")"))
                if depth and word == "\n":
                    continue
                self._groups += 1
                group, first, current = self._groups, True, None
                continue
            if first and not depth and (found := _ASSIGN.match(word)):
                self._assign(found[1], found[2], start + found.start(2))
                continue
            first = first and word in ("export", "env", "local", "readonly", "set")
            current = self._word(word, start, end, current, group)

    def _assign(self, name: str, raw: str, at: int) -> None:
        inner, offset = raw, 0
        if len(raw) >= 2 and raw[0] in "\"'" and raw[-1] == raw[0]:
            inner, offset = raw[1:-1], 1
        if re.search(r"(^|\s)--[A-Za-z]", inner):
            self._scan(inner, at + offset)
        elif raw:
            if name in ("NGPU", "NNODE", "NNODES", "NPROC_PER_NODE"):  # what launch scripts read
                self._raw[(name,)] = [(raw, (at, at + len(raw)))]
            self._set.setdefault(name, []).append((inner, (at + offset, at + offset + len(inner))))

    def _word(self, word: str, start: int, end: int, current: Path | None, group: int) -> Path | None:
        name, equals, rest = word.partition("=")
        if re.match(r"--[A-Za-z][\w.-]*$", name) or name in _SHORT:
            path: Path = tuple(_SHORT.get(name, name.lstrip("-").replace("-", "_")).split("."))
            self._dashes += "-" in name.lstrip("-")
            self._scores += "_" in name
            self._equals += bool(equals)
            words = [(rest, (start + len(name) + 1, end))] if equals else []
        elif (found := _OVERRIDE.match(word)) and current is None:
            path, words = tuple(found[1].split(".")), [(found[2], (start + found.start(2), end))]
            self._overrides.add(path)
            equals = "="
        elif re.match(r"-[A-Za-z]", word):
            return None
        else:
            if current is None:
                return None
            words = self._raw[current]
            if words and _is(number(_decode(words[0][0]))) and not _is(number(_decode(word))):
                return None  # `--lr 1e-3 /data`: the number was all
            words.append((word, (start, end)))
            self._ends[group] = end
            return current
        if path in self._raw:
            self.twice.add(path)
        self._raw[path] = words
        self._group[path] = group
        self._ends[group] = end
        return None if equals else path

    def _finish(self, path: Path, words: list[tuple[str, Span]]) -> None:
        if not words:
            self.leaf(path, True, (0, 0))
            del self.spans[path]
            return
        parts = [self._resolve(raw, span) for raw, span in words]
        if len(parts) == 1 and isinstance(text := parts[0][0], str) and re.match(r"\[.*\]$", text):
            items = [number(x.strip()) for x in text[1:-1].split(",")]
            self.leaf(path, items, parts[0][1])
        elif len(parts) == 1:
            self.leaf(path, *parts[0])
        else:
            self.leaf(path, [v for v, _ in parts], (parts[0][1][0], parts[-1][1][1]))
            for i, (_, span) in enumerate(parts):
                self.spans[(*path, i)] = span

    def _resolve(self, raw: str, span: Span) -> tuple[Any, Span]:
        """(value, where it is written) of one word, through variables of the script."""
        for _ in range(5):
            quoted = raw[:1] in "\"'" and raw[-1:] == raw[:1] and len(raw) > 1
            inner = raw[1:-1] if quoted else raw
            where = (span[0] + 1, span[1] - 1) if quoted else span
            variable = _VARIABLE.match(inner) if raw[:1] != "'" else None
            if variable is None:
                break
            sets = self._set.get(variable[1], [])
            if len(sets) != 1:
                return Odd(f"{raw}, which " + ("is set more than once" if sets else "is not set in this file")), span
            raw, span = sets[0]
        fallback = re.match(r"\$\{([A-Za-z_]\w*):?-([^}$]*)\}$", inner) if raw[:1] != "'" else None
        if fallback and [raw for raw, _ in self._set.get(fallback[1], [])] in ([], [inner]):
            self.notes.append(f"{fallback[1]} is read as {fallback[2]}, its value unless the environment sets it")
            at = where[0] + fallback.start(2)
            return number(_decode(fallback[2])), (at, at + len(fallback[2]))
        if "$" in inner and raw[:1] != "'":
            return Odd(f"{raw}, which the shell works out"), where
        text = _decode(raw)
        if text.lower() in ("true", "false"):
            return text.lower() == "true", where
        return (None if text.lower() in ("none", "null") else number(text)), where

    def literal(self, value: Any) -> str:
        if isinstance(value, list):
            return spell(value).replace(" ", "")
        if isinstance(value, str):
            return value if re.match(r"[\w=.,+/-]+$", value) else shlex.quote(value)
        return spell(value)

    def set(self, path: Path, value: Any) -> None:
        if isinstance(value, list) and path in self.spans:
            text = self.text[slice(*self.spans[path])]
            if not re.search(r"\[", text) and (*path, 0) not in self.spans:
                raise self.error(f"--{dotted(path)} must be {len(value)} numbers; it is {text}")
        super().set(path, value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        group = self._group.get(self.near) or next(reversed(self._ends))
        words = " ".join(map(spell, value)) if isinstance(value, list) else self.literal(value)
        if self._overrides and self.near in self._overrides:
            return self._ends[group], f" +{dotted(path)}={self.literal(value)}"
        name = dotted(path)
        if self._dashes > self._scores:
            name = name.replace("_", "-")
        counted = len(self._raw)
        gap = "=" if self._equals * 2 > counted and not isinstance(value, list) else " "
        return self._ends[group], f" --{name}{gap}{words}"


def _decode(word: str) -> str:
    try:
        return "".join(shlex.split(word)) if word else ""
    except ValueError:
        return word


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
