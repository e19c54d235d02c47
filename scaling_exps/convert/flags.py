"""Command lines: `torchrun --nproc_per_node=4 train.py --lr 1e-3 model.optim.betas=[0.9,0.95]`, alone or in a script.

Words end where a shell ends them, and shlex reads each; `#` comments are never touched. Flags that stand in a variable
or an array of the script are read there, and `$NAME` is read, and written, where the script sets NAME.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from scaling_exps.convert.documents import FILE, Document, Odd, Path, dotted, is_number, number, spell

_TOKEN = re.compile(
    r"""(?P<gap>[ \t\r]+|\\\r?\n)|(?P<comment>\#[^\n]*)|(?P<end>\n|[;&|()<>]+)
    |(?P<word>(?:\\.|\$\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\)|\$\{[^}\n]*\}|"(?:\\.|[^"\\])*"|'[^']*'|[^\s"'\\;&|()<>])+)
    |(?P<bad>.)""",
    re.X | re.S,
)
_CONFIGURATION = re.compile(r"[^=\"']+\.(ya?ml|toml|json)$|([^=\"']*/)?configs?/[^=\"']+\.py$")
_SHORT = {"-b": "batch_size", "-j": "workers"}
_LAUNCH = ("NGPU", "NNODE", "NNODES", "NPROC_PER_NODE")  # what launch scripts read, where no flag does
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?$")
_LOOSE = re.compile(r"\$\{?(\w+|[@*])(\[[@*]\]|[:#%/][^}]*)?\}?$")  # one variable, `$@` and `${A[@]}` too
_A_CONFIGURATION = re.compile(r"conf|cfg|ya?ml|toml|json", re.I)
_ASSIGN = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", re.S)
_QUOTED = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')$""", re.S)  # from the first to the last character
_FLAG = re.compile(r"(^|\s)--[A-Za-z]")
_SETTING = re.compile(r"(^|\s)[^\s={(]+=[^=]")
_DOTTED = re.compile(r"(^|\s)\+{0,2}[A-Za-z_]\w*(\.\w+)+=\S")

Span = tuple[int, int]
Word = tuple[str, Span]


class Flags(Document):
    syntax = "flags"

    def parse(self) -> None:
        self._words: dict[Path, list[Word]] = {}  # what follows each flag
        self._variables: dict[str, list[Word]] = {}  # what the script assigns to each
        self._group: dict[Path, int] = {}  # which command, array or string a flag stands in
        self._ends: dict[int, int] = {}  # where the last word of each ends
        self._overrides: set[Path] = set()
        self._loose: list[tuple[str, Word]] = []  # names of variables that follow no flag, and where
        self._flags_in: set[str] = set()  # variables and arrays that hold flags, which are read where they are set
        self._equals = self._dashes = self._scores = self._groups = 0
        self._scan(self.text, 0)
        self._loosely()
        flags = [raw for path, words in self._words.items() if path[0] not in _LAUNCH for raw, _ in words]
        used = {name for raw in flags for name in re.findall(r"\$\{?([A-Za-z_]\w*)", raw)}
        self._words = {p: w for p, w in self._words.items() if p[0] not in _LAUNCH or p[0] not in used}
        for path, words in self._words.items():
            parts = [self._resolve(*word) for word in words]
            value, span = parts[0] if parts else (True, None)
            if len(parts) > 1:
                value, span = [v for v, _ in parts], (parts[0][1][0], parts[-1][1][1])
                self.spans |= {(*path, i): where for i, (_, where) in enumerate(parts)}
            elif isinstance(value, str) and re.match(r"\[.*\]$", value):
                value = [number(x.strip()) for x in value[1:-1].split(",")]
            self.leaf(path, value, span)

    def _scan(self, text: str, base: int) -> None:
        self._groups += 1
        group, depth, first, talk = self._groups, 0, True, False
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
                group, first, talk, current = self._groups, True, False, None
                continue
            if talk := talk or (first and word in ("echo", "printf")):  # it says, and sets nothing
                continue
            if first and not depth and (found := _ASSIGN.match(word)):
                self._assign(found[1], found[2], start + found.start(2))
                continue
            program = first and _LOOSE.match(word.strip('"'))  # `$PYTHON train.py`
            first = first and word in ("export", "env", "local", "readonly", "set")
            if program:
                continue
            current = self._word(word, (start, end), current, group)

    def _assign(self, name: str, raw: str, at: int) -> None:
        quote = len(raw) >= 2 and raw[0] in "\"'" and raw[-1] == raw[0]
        inner, start = (raw[1:-1], at + 1) if quote else (raw, at)
        if not raw:  # an array, whose words follow
            self._flags_in.add(name)
        elif _FLAG.search(inner) or _DOTTED.search(inner):
            self._flags_in.add(name)
            self._scan(inner, start)
        else:
            if name in _LAUNCH:
                self._words[(name,)] = [(raw, (at, at + len(raw)))]
            self._variables.setdefault(name, []).append((inner, (start, start + len(inner))))

    def _word(self, word: str, span: Span, current: Path | None, group: int) -> Path | None:
        """Note a word that may belong to the flag `current`; return the flag that waits for the next one."""
        quote = word[0] if _QUOTED.match(word) else ""
        bare = word[1:-1] if quote else word
        name, equals, rest = bare.partition("=")
        path, override = current, _OVERRIDE.match(bare)
        if re.match(r"--[A-Za-z][\w.-]*$", name) or name in _SHORT:
            path = tuple(_SHORT.get(name, name.lstrip("-").replace("-", "_")).split("."))
            self._dashes += "-" in name.lstrip("-")
            self._scores += "_" in name
            self._equals += bool(equals)
        elif override and (current is None or "." in override[1]):
            path, rest = tuple(override[1].split(".")), override[2]
            self._overrides.add(path)
        elif (
            re.search("[\"']", word)
            and "$(" not in word
            and (_FLAG.search(text := _decode(word)) or (current is None and _SETTING.search(text)))
        ):
            raise self.error(
                f"{word[:80]} is in quotes, and what it sets cannot be told: write each flag as --name value and each "
                "override as name=value, in no quotes, or in one pair around all of it"
            )
        elif current is None or re.match(r"-[A-Za-z]", word):
            if _CONFIGURATION.match(bare):
                self._words[FILE, bare] = [(word, span)]
            elif (loose := _LOOSE.match(bare)) and word[0] != "'":
                self._loose.append((loose[1], (bare, span)))
            return None
        else:
            words = self._words[current]
            alone = words and is_number(number(_decode(words[0][0]))) and not is_number(number(_decode(word)))
            if alone or (words and words[-1][0].endswith(".py")):  # `--lr 1e-3 /data`, `--standalone train.py lr=1`
                return self._word(word, span, None, group)
            words.append((word, span))
            self._ends[group] = span[1]
            return current
        if path in self._words:
            self.twice.add(path)
        rest = quote + rest + quote
        self._words[path] = [(rest, (span[1] - len(rest), span[1]))] if equals else []
        self._group[path], self._ends[group] = group, span[1]
        return None if equals else path

    def _loosely(self) -> None:
        """Take a variable that follows no flag for the configuration that it names; say which ones are not known."""
        for name, (word, span) in self._loose:
            if name in self._flags_in:
                continue
            value = self._resolve(word, span)[0]
            if isinstance(value, str) and _CONFIGURATION.match(value):
                self._words[FILE, value] = [(word, span)]
            elif isinstance(value, Odd) and _A_CONFIGURATION.search(name):
                self._words[FILE, word] = [(word, span)]
            elif isinstance(value, Odd):
                self.notes.append(f"what it adds is not looked at: {value}")

    def _resolve(self, raw: str, span: Span) -> tuple[Any, Span]:
        """(value, where it is written) of one word, through variables of the script."""
        for _ in range(5):
            quoted = raw[:1] in "\"'" and raw[-1:] == raw[:1] and len(raw) > 1
            inner = raw[1:-1] if quoted else raw
            where = (span[0] + 1, span[1] - 1) if quoted else span
            variable = _VARIABLE.match(inner) if raw[:1] != "'" else None
            if variable is None:
                break
            sets = self._variables.get(variable[1], [])
            if len(sets) != 1:
                return Odd(f"{raw}, which " + ("is set more than once" if sets else "is not set in this file")), span
            raw, span = sets[0]
        fallback = re.match(r"\$\{([A-Za-z_]\w*):?-([^}$]*)\}$", inner) if raw[:1] != "'" else None
        if fallback and [raw for raw, _ in self._variables.get(fallback[1], [])] in ([], [inner]):
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
        if isinstance(value, str):
            return value if re.match(r"[\w=.,+/-]+$", value) else shlex.quote(value)
        return spell(value).replace(" ", "")

    def set(self, path: Path, value: Any) -> None:
        text = self.text[slice(*self.spans.get(path, (0, 0)))]
        if isinstance(value, list) and text and "[" not in text and (*path, 0) not in self.spans:
            raise self.error(f"--{dotted(path)} must be {len(value)} numbers; it is {text}")
        super().set(path, value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        end = self._ends[self._group.get(self.near) or next(reversed(self._ends))]
        name, many = dotted(path), isinstance(value, list)
        if self.near in self._overrides or path[0] in {p[0] for p in self._overrides}:
            return end, f" ++{name}={self.literal(value)}"  # sets it, or adds it
        if self._dashes > self._scores:
            name = name.replace("_", "-")
        gap = "=" if self._equals * 2 > len(self._words) and not many else " "
        return end, f" --{name}{gap}{' '.join(map(spell, value)) if many else self.literal(value)}"


def _decode(word: str) -> str:
    try:
        return "".join(shlex.split(word)) if word else ""
    except ValueError:
        return word
