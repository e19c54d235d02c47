"""Recipe files as text with addressable values: what is not set stays as it was, to the byte.

A path is a tuple of keys and list indices: ("optimizer", "init_args", "lr"). `values` holds every leaf: numbers,
strings, booleans, None, and lists of them. The libraries say where each value stands (ruamel.yaml's nodes, json's
decoder, tomlkit's items, shlex's words, ast's nodes); only those places are replaced. What was written is read again
and compared, leaf by leaf, before anybody sees it.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import stat
import sys
import tomllib
from pathlib import Path as File
from typing import Any

from scaling_exps.rules import RuleError

Path = tuple[str | int, ...]
LIMIT = 64 * 1024  # bytes of a recipe
LINES = 1_500
LEAVES = 2_000  # values in one recipe, aliases written out
DEPTH = 40


@functools.cache
def words(table: str, name: str) -> frozenset[str]:
    """The words of a row of keys.toml."""
    return frozenset(tomllib.loads(File(__file__).with_name("keys.toml").read_text())[table][name].split())


class Odd(str):
    """A value that is no number, string, boolean or null; the text says what it is."""


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def as_path(key: Path | str) -> Path:
    return (key,) if isinstance(key, str) else key


def library(name: str) -> Any:
    """Import `name` of the extra `convert`, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RuleError(
            f"{name} is not installed, and `convert` reads this kind of file with it: pip install 'scalerun[convert]'"
        ) from None


def read_file(name: str) -> str:
    """The text of a recipe file; `-` is standard input. Line ends stay as they are.

    Raises:
        RuleError: not a regular file, longer than LIMIT, or not UTF-8.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(LIMIT + 1) if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        else:
            if not stat.S_ISREG(os.stat(name).st_mode):  # a fifo would wait for ever, /dev/zero never ends
                raise RuleError(f"{name} is not a regular file; give a recipe file, or - for standard input")
            with open(name, "rb") as f:
                data = f.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise RuleError(
                f"{name} is longer than {LIMIT // 1024} kB, and a recipe is a few pages: is it the right file?"
            )
        return data.decode()
    except OSError as e:
        raise RuleError(f"{name}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise RuleError(f"{name} is not a text file (UTF-8): {e.reason} at byte {e.start}") from None


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def number(value: Any) -> Any:
    """A string that spells a number becomes it; all else stays. A number too long to be one is an Odd."""
    if isinstance(value, Odd) or not isinstance(value, str) or not _FLOAT.match(value.strip()):
        return value
    if re.match(r"[-+]?0\d", value.strip()):
        return Odd(f"{value} (octal for some readers, decimal for others)")
    return finite(float(value) if re.search(r"[.eE]", value) or len(value) > 300 else int(value))


def finite(value: float) -> Any:
    return value if abs(value) < 1e300 and not math.isnan(value) else Odd("a number beyond all ranges")


def spell(value: Any) -> str:
    """A value as YAML 1.1, JSON, TOML and Python all read it back: 5e-09 needs the point."""
    if isinstance(value, list):
        return "[" + ", ".join(map(spell, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


class Document:
    """Text, the values in it and where each stands. Subclasses fill `values` and `spans`, and know how to insert."""

    syntax = ""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.values: dict[Path, Any] = {}
        self.spans: dict[Path, tuple[int, int]] = {}  # of a leaf; of each element of a list under path + (i,)
        self.twice: set[Path] = set()  # keys that stand twice, where the syntax allows it
        self.wanted: dict[Path, Any] = {}  # what was set
        self.read: set[Path] = set()  # what was asked for
        self.edits: dict[tuple[int, int], str] = {}
        self.near: Path = ()  # a flag beside which new flags are put
        self.after: Document | None = None  # what was written, read again
        self.partners: tuple[str, ...] = ()  # names of files that belong to it
        self.guessed = False  # whether its form was guessed
        self.notes: list[str] = []  # what reading it assumed
        if re.search(rf"[\[{{(](\s*[\[{{(]){{{DEPTH}}}|(- ){{{DEPTH}}}", text):
            raise RuleError(f"{where} is nested more than {DEPTH} deep; no recipe is")
        try:
            self.parse()
        except RecursionError:
            raise RuleError(f"{where} is nested too deep; no recipe is") from None
        if not self.values:
            raise RuleError(f"{where}: the top level must be keys and values, as in `lr: 0.001`; there are none")

    def parse(self) -> None:
        raise NotImplementedError

    def leaf(self, path: Path, value: Any, span: tuple[int, int]) -> None:
        self.values[path], self.spans[path] = value, span
        if len(self.values) > LEAVES or len(path) > DEPTH:
            raise RuleError(f"{self.where} has more than {LEAVES} values, or is nested more than {DEPTH} deep")

    def has(self, path: Path | str) -> bool:
        """Whether there is such a leaf, or a mapping or list of that name."""
        path = as_path(path)
        return any(p[: len(path)] == path for p in self.values)

    def get(self, path: Path | str) -> Any:
        path = as_path(path)
        self.read.add(path)
        if path in self.twice:
            raise RuleError(f"{self.where}: {dotted(path)} stands there twice; which one counts?")
        return self.wanted.get(path, self.values.get(path))

    def set(self, path: Path, value: Any) -> None:
        """Put `value` at `path`: in place where the key is there, beside its siblings where it is not."""
        self.wanted[path] = value
        if path not in self.spans:
            return
        old = self.values[path]
        spots: list[tuple[Path, Any]] = [(path, value)]
        if isinstance(value, list) and isinstance(old, list) and len(old) == len(value) and (*path, 0) in self.spans:
            spots = [((*path, i), v) for i, v in enumerate(value)]
        for spot, v in spots:
            span, new = self.spans[spot], self.literal(v)
            if span[0] == span[1] and self.text[span[0] - 1] == ":":  # an empty value of YAML
                new = f" {new}"
            if self.edits.setdefault(span, new) != new:
                raise RuleError(
                    f"{self.where}: one place in the file is read as several values, and {dotted(path)} needs one of "
                    "its own: write it out where it is used"
                )
        for other, span in self.spans.items():  # an alias, a merge key, a variable
            if other != path and other in self.values and span == self.spans[path]:
                if other[-1] != path[-1]:
                    raise RuleError(
                        f"{self.where}: {dotted(path)} and {dotted(other)} are one place in the file, and only the "
                        "first must change: write both out"
                    )
                self.wanted.setdefault(other, value)

    def render(self) -> str:
        """The text with every `set` in it.

        Raises:
            RuleError: a value that was not set would change with one that was (it is computed from it).
        """
        if not self.wanted:
            return self.text
        edits = dict(self.edits)
        for path, value in sorted(
            self.wanted.items(), key=lambda item: -len(item[0])
        ):  # at one place the deepest first
            if path not in self.spans:
                at, new = self.insertion(path, value)
                edits[at, at] = edits.get((at, at), "") + new
        text = self.text
        for (start, end), new in sorted(edits.items(), reverse=True):
            text = text[:start] + new + text[end:]
        self.check(text)
        return text

    def check(self, text: str) -> None:
        self.after = type(self)(text, self.where)
        seen = self.after.values
        for path in {*seen, *self.values, *self.wanted}:
            want = self.wanted.get(path, self.values.get(path))
            if seen.get(path) != want and not isinstance(want, Odd):
                raise RuleError(
                    f"{self.where}: {dotted(path)} would become {seen.get(path)!r} instead of {want!r}, because the "
                    "file computes it from a value that changes, or says it in a way that is not known: write it out"
                )

    def literal(self, value: Any) -> str:
        return spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        """(where, what) to insert for a key that is not there."""
        raise NotImplementedError

    def missing(self, path: Path) -> RuleError:
        return RuleError(
            f"{self.where} has no {dotted(path)}, and no place for it: add `{path[-1]}` there so that it can be set"
        )


class Json(Document):
    syntax = "json"

    def parse(self) -> None:
        import json

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = [k for k, _ in pairs]
            if twice := {k for k in keys if keys.count(k) > 1}:
                raise RuleError(
                    f"{self.where}: {', '.join(sorted(twice))} stands twice in one object; which one counts?"
                )
            return dict(pairs)

        self._ends: dict[Path, tuple[int, int]] = {}  # an object: where its last member starts and ends
        try:
            tree = json.JSONDecoder(object_pairs_hook=unique).decode(self.text.removeprefix("\ufeff"))
        except json.JSONDecodeError as e:
            raise RuleError(f"{self.where} cannot be read as JSON: {e}") from None
        except ValueError as e:  # more digits than Python will read
            raise RuleError(f"{self.where} cannot be read as JSON: {e}") from None
        if not isinstance(tree, dict):
            raise RuleError(f'{self.where}: the top level must be keys and values, as in {{"lr": 0.001}}')
        self._walk(tree, (), self.text.index("{"))

    def _walk(self, value: Any, path: Path, at: int) -> int:
        """Note `value`, which starts at `at`; return where it ends."""
        from json import JSONDecoder
        from json.decoder import scanstring  # type: ignore[attr-defined]

        text = self.text

        def skip(i: int, marks: str = "") -> int:
            while text[i].isspace() or text[i] in marks:
                i += 1
            return i

        if isinstance(value, dict):
            start = end = at + 1
            for key, member in value.items():
                start = skip(end, ",")
                after = scanstring(text, start + 1)[1]
                end = self._walk(member, (*path, key), skip(after, ":"))
            self._ends[path] = (start, end)
            return skip(end) + 1
        if isinstance(value, list):
            end = at + 1
            nested = any(isinstance(v, dict | list) for v in value)
            for i, member in enumerate(value):
                start = skip(end, ",")
                end = self._walk(member, (*path, i), start) if nested else JSONDecoder().raw_decode(text, start)[1]
                self.spans[(*path, i)] = (start, end)
            if not nested:
                self.leaf(path, [_plain(v) for v in value], (at, skip(end) + 1))
            return skip(end) + 1
        end = JSONDecoder().raw_decode(text, at)[1]
        self.leaf(path, _plain(value), (at, end))
        return end

    def literal(self, value: Any) -> str:
        import json

        return json.dumps(value) if isinstance(value, str) else spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        if path[:-1] not in self._ends:
            raise self.missing(path)
        start, end = self._ends[path[:-1]]
        before = self.text[:start].rpartition("\n")
        gap = self.newline + before[2] if before[1] and before[2].strip() == "" else " "
        key = f'"{path[-1]}": {self.literal(value)}'
        return end, key if start == end else f",{gap}{key}"


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    return number(value) if isinstance(value, str) else finite(value)


class Toml(Document):
    """tomlkit keeps everything of a file but the values that are set."""

    syntax = "toml"

    def parse(self) -> None:
        tomlkit = library("tomlkit")
        try:
            tree = tomllib.loads(self.text)  # fast, strict, and refuses keys that stand twice
            self._doc = tomlkit.parse(self.text)
        except (tomllib.TOMLDecodeError, tomlkit.exceptions.TOMLKitError, ValueError) as e:
            raise RuleError(f"{self.where} cannot be read as TOML: {one_line(e)}") from None

        def walk(value: Any, path: Path) -> None:
            if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
                for key, member in value.items() if isinstance(value, dict) else enumerate(value):
                    walk(member, (*path, key))
            elif isinstance(value, list):
                self.leaf(path, [_plain(v) for v in value], (0, 0))
            else:
                known = isinstance(value, bool | int | float | str)
                self.leaf(path, _plain(value) if known else Odd("a date"), (0, 0))

        walk(tree, ())
        self.spans = {}

    def set(self, path: Path, value: Any) -> None:
        self.wanted[path] = value
        at: Any = self._doc
        for key in path[:-1]:
            if isinstance(at, dict) and key not in at:
                at[key] = library("tomlkit").table()
            if isinstance(at, list) is not isinstance(key, int):
                raise self.missing(path)
            at = at[key]
        if isinstance(at, list) is not isinstance(path[-1], int):
            raise self.missing(path)
        at[path[-1]] = value

    def render(self) -> str:
        if not self.wanted:
            return self.text
        text: str = self._doc.as_string()
        if self.newline == "\r\n":
            text = re.sub(r"(?<!\r)\n", "\r\n", text)
        self.check(text)
        return text


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_document(text: str, where: str) -> Document:
    """The document in the syntax that its name, or its first lines, say."""
    from scaling_exps.convert.flags import Flags
    from scaling_exps.convert.python import Python
    from scaling_exps.convert.yaml import Yaml

    if len(text) > LIMIT or text.count("\n") > LINES:
        raise RuleError(f"{where} is longer than {LIMIT // 1024} kB or {LINES} lines, and a recipe is a few pages")
    if not text.strip():
        raise RuleError(f"{where} is empty")
    kinds: dict[str, type[Document]] = {
        ".json": Json,
        ".toml": Toml,
        ".py": Python,
        ".sh": Flags,
        ".bash": Flags,
        ".sbatch": Flags,
    }
    if (ending := File(where).suffix.lower()) in kinds:
        return kinds[ending](text, where)
    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    flagged = any(re.search(r"(^|\s)(--[A-Za-z]|-[a-z] |\+{0,2}[A-Za-z_]\w*(\.\w+)+=\S)", line) for line in code)
    keyed = any(re.match(r"[\"']?[\w.-]+[\"']?\s*:(\s|$)", line) for line in code)
    if ending not in (".yaml", ".yml"):
        if text.lstrip("\ufeff \t\r\n")[0] == "{":
            return Json(text, where)
        if any(re.match(r"\s*\[[\w.\s-]+\]\s*(#.*)?$", line) for line in code) and not keyed:
            return Toml(text, where)
        if flagged and not keyed:
            return Flags(text, where)
        if not keyed and any(re.match(r"(\w+\s*=[^=]|def \w|from \w|import \w)", line) for line in code):
            return Python(text, where)
    elif text.lstrip()[:1] == "{" and '"' in text and not keyed:
        try:
            return Json(text, where)
        except RuleError:
            return Yaml(text, where)
    return Flags(text, where) if flagged and not keyed else Yaml(text, where)
