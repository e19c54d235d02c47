"""Recipe files as text with addressable values: what is not set stays as it was, to the byte.

A path is a tuple of keys: ("optimizer", "init_args", "lr"). Values are numbers, strings, booleans, None, or lists of
them; a number that YAML 1.1 takes for a string (1e-3) is a number here.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from scaling_exps.rules import RuleError

Path = tuple[str, ...]
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")


class Document:
    """Text, the values in it and where each stands. Subclasses fill `values`, `spans` and `ends`, and write values."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.values: dict[Path, Any] = {}
        self.spans: dict[Path, tuple[int, int]] = {}  # of a value; of each element under path + (str(i),)
        self.edits: dict[tuple[int, int], str] = {}
        self.added: dict[Path, Any] = {}

    def get(self, path: Path) -> Any:
        return self.added.get(path, self.values.get(path))

    def set(self, path: Path, value: Any) -> None:
        """Put `value` at `path`: in place where the key is there, on a line of its own where it is not."""
        if path not in self.spans:
            self.added[path] = value
            return
        old = self.values[path]
        if isinstance(value, list) and isinstance(old, list) and len(old) == len(value):
            for i, v in enumerate(value):
                self._replace(self.spans[(*path, str(i))], self.literal(v))
        else:
            self._replace(self.spans[path], self.literal(value))
        self.values[path] = value

    def _replace(self, span: tuple[int, int], new: str) -> None:
        if self.edits.setdefault(span, new) != new:
            raise RuleError(
                f"{self.where}: one place in the file (an alias?) would need two values; write it out twice"
            )

    def render(self) -> str:
        edits = dict(self.edits)
        for path, value in self.added.items():
            at, new = self.insertion(path, value)
            edits[at, at] = edits.get((at, at), "") + new
        text = self.text
        for (start, end), new in sorted(edits.items(), reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def literal(self, value: Any) -> str:
        raise NotImplementedError

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        """(where, what) to insert for a key that is not there."""
        raise NotImplementedError

    def children(self, parent: Path) -> list[Path]:
        return [p for p in self.spans if p[:-1] == parent and p in self.values]


def number(value: Any) -> Any:
    """A string that spells a number becomes it; all else stays."""
    if isinstance(value, str) and _FLOAT.match(value.strip()):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    return value


def spell(value: Any) -> str:
    """A number as YAML 1.1, JSON, TOML and Python all read it back: 5e-09 needs the point."""
    text = repr(value)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


class Yaml(Document):
    """YAML, and JSON as the part of it with braces."""

    def __init__(self, text: str, where: str) -> None:
        import yaml

        super().__init__(text, where)
        self.flow = text.lstrip()[:1] == "{"
        try:
            # In JSON a tab is a space; the lengths agree, so the places stay right.
            root = yaml.compose(text.replace("\t", " ") if self.flow else text, yaml.SafeLoader)
        except yaml.YAMLError as e:
            raise RuleError(f"{where} cannot be read as {'JSON' if self.flow else 'YAML'}: {_one_line(e)}") from e
        if not isinstance(root, yaml.MappingNode):
            raise RuleError(f"{where}: the top level must be keys and values, as in `lr: 0.001`")
        construct = yaml.SafeLoader("").construct_object
        self._columns: dict[Path, int] = {}

        def walk(node: Any, path: Path) -> None:
            for key, value in node.value:
                here = (*path, str(key.value))
                self._columns.setdefault(path, key.start_mark.column)
                if isinstance(value, yaml.MappingNode):
                    walk(value, here)
                    continue
                self.spans[here] = (value.start_mark.index, value.end_mark.index)
                if isinstance(value, yaml.SequenceNode):
                    self.values[here] = [number(construct(v, deep=True)) for v in value.value]
                    for i, v in enumerate(value.value):
                        self.spans[(*here, str(i))] = (v.start_mark.index, v.end_mark.index)
                else:
                    self.values[here] = number(construct(value))

        walk(root, ())

    def literal(self, value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(self.literal, value)) + "]"
        return json.dumps(value) if not isinstance(value, float) else spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        siblings = self.children(path[:-1])
        if not siblings:
            raise RuleError(
                f"{self.where} has no {'.'.join(path)}, and nothing stands in {'.'.join(path[:-1]) or 'it'}: "
                f"add `{path[-1]}` there so that it can be set"
            )
        end = max(self.spans[s][1] for s in siblings)
        if not self.flow:
            at = self.text.find("\n", end - 1)  # a block sequence ends behind its newline, a scalar before it
            at = len(self.text) if at < 0 else at
            return at, f"\n{' ' * self._columns[path[:-1]]}{path[-1]}: {self.literal(value)}"
        line = self.text[: min(self.spans[s][0] for s in siblings)].rsplit("\n", 1)
        indent = re.match(r"\s*", line[-1])
        assert indent is not None
        gap = "\n" + indent[0] if len(line) > 1 and line[-1].strip().startswith('"') else " "
        return end, f',{gap}"{path[-1]}": {self.literal(value)}'


class Toml(Document):
    """TOML of sections and one-line values, which is what training recipes are."""

    _LINE = re.compile(r"""^[ \t]*([\w-]+)[ \t]*=[ \t]*("[^"\n]*"|'[^'\n]*'|\[[^\]\n]*\]|[^#\n]*?)[ \t]*(?:#.*)?$""")

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text, where)
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise RuleError(f"{where} cannot be read as TOML: {e}") from e
        self._ends: dict[Path, int] = {}  # end of the last line of a section
        section: Path = ()
        at = 0
        for line in text.splitlines(keepends=True):
            bare = line.rstrip("\n")
            if header := re.match(r"\s*\[([\w.\-]+)\]", bare):
                section = tuple(header[1].split("."))
                self._ends[section] = at + len(bare)
            elif found := self._LINE.match(bare):
                path = (*section, found[1])
                value: Any = tree
                for key in path:
                    value = value[key] if isinstance(value, dict) and key in value else None
                self.values[path] = value
                self.spans[path] = (at + found.start(2), at + found.end(2))
                self._ends[section] = at + len(bare)
            at += len(line)

    def literal(self, value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(self.literal, value)) + "]"
        return spell(value) if isinstance(value, float) else json.dumps(value)

    def set(self, path: Path, value: Any) -> None:
        if isinstance(value, list) and path in self.spans:
            self._replace(self.spans[path], self.literal(value))
            self.values[path] = value
        else:
            super().set(path, value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        line = f"\n{path[-1]} = {self.literal(value)}"
        if path[:-1] in self._ends:
            return self._ends[path[:-1]], line
        return len(self.text.rstrip("\n")), f"\n\n[{'.'.join(path[:-1])}]{line}"


class Flags(Document):
    """A command line: `python train.py data --lr 1e-3 --opt-betas 0.9 0.999`, over as many lines as one likes."""

    _TOKEN = re.compile(r"""#[^\n]*|(?:"[^"\n]*"|'[^'\n]*'|[^\s"'])+""")
    _SHORT = {"-b": "batch_size", "-c": "config"}  # noqa: RUF012

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text, where)
        path: Path | None = None
        self._end = 0
        for token in self._TOKEN.finditer(text):
            word = token[0]
            if word.startswith("#") or word == "\\":
                continue
            self._end = token.end()
            name, equals, _ = word.partition("=")
            if re.match(r"--[A-Za-z]", word) or name in self._SHORT:
                path = (self._SHORT.get(name, name.lstrip("-").replace("-", "_")),)
                start = token.start() + len(name) + len(equals) if equals else token.end()
                self.spans[path] = (start, token.end())
                self.values[path] = number(text[start : token.end()]) if equals else True
            elif path is not None:
                one = number(word.strip("\"'"))
                span, old = (token.start(), token.end()), self.values[path]
                first = old is True
                self.values[path] = one if first else [*(old if isinstance(old, list) else [old]), one]
                if isinstance(self.values[path], list) and not isinstance(old, list):
                    self.spans[(*path, "0")] = self.spans[path]
                if isinstance(self.values[path], list):
                    self.spans[(*path, str(len(self.values[path]) - 1))] = span
                self.spans[path] = span if first else (self.spans[path][0], span[1])
        if not self.values:
            raise RuleError(f"{where} holds no flags: expected something like `--opt adamw --lr 1e-3 --batch-size 128`")

    def literal(self, value: Any) -> str:
        return " ".join(map(self.literal, value)) if isinstance(value, list) else spell(value).strip("'")

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        return self._end, f" --{path[-1].replace('_', '-')} {self.literal(value)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
