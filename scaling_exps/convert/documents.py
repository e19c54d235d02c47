"""Recipe files as text with addressable values: what is not set stays as it was, to the byte.

A path is a tuple of keys and list indices: ("optimizer", "init_args", "lr"). `values` holds every leaf: numbers,
strings, booleans, None, and lists of them. The libraries say where each value stands (ruamel.yaml's and ast's nodes,
tomlkit's items, a shell's words); only those places are replaced. What was written is read again
and compared, leaf by leaf, before anybody sees it.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
import tomllib
from pathlib import Path as File
from typing import Any

from scaling_exps.rules import RuleError

Path = tuple[str | int, ...]
FILE = "a file of the command"  # first key of a configuration that a command line names without a flag
LIMIT = 64 * 1024  # bytes of a recipe
LINES = 1_500
LEAVES = 2_000  # values in one recipe, aliases written out
DEPTH = 40
KEYS: dict[str, Any] = tomllib.loads(File(__file__).with_name("keys.toml").read_text())


def words(table: str, name: str) -> frozenset[str]:
    """The words of a row of keys.toml."""
    return frozenset(KEYS[table].get(name, "").split())


class Odd(str):
    """A value that is no number, string, boolean or null; the text says what it is."""


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def path_of(key: Path | str) -> Path:
    return tuple(key.split(".")) if isinstance(key, str) else key


def library(name: str) -> Any:
    """Import `name` of the extra `convert`, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RuleError(f"{name} is not installed, and this file needs it: pip install 'scalerun[convert]'") from None


def read_file(name: str) -> str:
    """The text of a recipe file; `-` is standard input. Line ends stay as they are.

    Raises:
        RuleError: not a regular file, longer than LIMIT, or not UTF-8.
    """
    try:
        if name != "-" and not stat.S_ISREG(os.stat(name).st_mode):  # a fifo would wait for ever, /dev/zero never ends
            raise RuleError(f"{name} is not a regular file; give a recipe file, or - for standard input")
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as f:
            data = f.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise RuleError(f"{name} is longer than {LIMIT // 1024} kB: is it the right file? A recipe is a few pages")
        return data.decode()
    except OSError as e:
        raise RuleError(f"{name}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise RuleError(f"{name} is not a text file (UTF-8): {e.reason} at byte {e.start}") from None


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def number(value: Any) -> Any:
    """A string that spells a number becomes it, and one beyond all ranges an Odd; all else stays."""
    if isinstance(value, str) and not isinstance(value, Odd) and _FLOAT.match(value.strip()):
        if re.match(r"[-+]?0\d", value.strip()):
            return Odd(f"{value} (octal for some readers, decimal for others)")
        value = float(value) if re.search(r"[.eE]", value) or len(value) > 300 else int(value)
    if not isinstance(value, int | float) or abs(value) < 1e300:  # NaN is not below it
        return value
    return Odd("a number beyond all ranges")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        self.edits: dict[tuple[int, int], tuple[Path, str]] = {}  # of each place who set it, and to what
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
            raise self.error("keys and values must be there, as in `lr: 0.001` or `--lr 0.001`; there are none")

    def parse(self) -> None:
        raise NotImplementedError

    def leaf(self, path: Path, value: Any, span: tuple[int, int] | None = None) -> None:
        """Note a value; one without a place is never written there."""
        self.values[path] = value
        if span is not None:
            self.spans[path] = span
        if len(self.values) > LEAVES or len(path) > DEPTH:
            raise RuleError(f"{self.where} has more than {LEAVES} values, or is nested more than {DEPTH} deep")

    def has(self, path: Path | str) -> bool:
        """Whether there is such a leaf, or a mapping or list of that name."""
        path = path_of(path)
        return any(p[: len(path)] == path for p in self.values)

    def get(self, path: Path | str) -> Any:
        path = path_of(path)
        self.read.add(path)
        if path in self.twice:
            raise self.error(f"{dotted(path)} stands there twice; which one counts?")
        return self.wanted.get(path, self.values.get(path))

    def set(self, path: Path, value: Any) -> None:
        """Put `value` at `path`: in place where the key is there, beside its siblings where it is not."""
        self.wanted[path] = value
        if path not in self.spans:
            return
        old, spots = self.values[path], [(path, value)]
        if isinstance(value, list) and isinstance(old, list) and len(old) == len(value) and (*path, 0) in self.spans:
            spots = [((*path, i), v) for i, v in enumerate(value)]
        for spot, v in spots:
            span, new = self.spans[spot], self.literal(v)
            if span[0] == span[1] and self.text[span[0] - 1] == ":":  # an empty value of YAML
                new = f" {new}"
            setter, before = self.edits.get(span, (spot, new))
            if setter != spot and before != new:
                raise self.error(
                    f"one place in the file is read as {dotted(path)} and as {dotted(setter)}: write both out"
                )
            self.edits[span] = spot, new
        for other, span in self.spans.items():  # an alias, a merge key, a variable
            if other != path and other in self.values and span == self.spans[path] and other[-1] == path[-1]:
                self.wanted[other] = value

    def render(self) -> str:
        """The text with every `set` in it.

        Raises:
            RuleError: a value that was not set would change with one that was (it is computed from it).
        """
        if not self.wanted:
            return self.text
        text = self.written()
        self.after = type(self)(text, self.where)
        for path in {*self.after.values, *self.values, *self.wanted}:
            want, seen = self.wanted.get(path, self.values.get(path)), self.after.values.get(path)
            if seen != want and not isinstance(want, Odd):
                span = self.spans.get(path)
                same = next((p for p in self.wanted if p != path and span and self.spans.get(p) == span), None)
                if same is not None:
                    raise self.error(f"{dotted(same)} and {dotted(path)} are one place in the file: write both out")
                raise self.error(
                    f"{dotted(path)} would become {seen!r} instead of {want!r}, because the file computes it from a "
                    "value that changes, or says it in a way that is not known: write it out"
                )
        return text

    def written(self) -> str:
        edits = {span: new for span, (_, new) in self.edits.items()}
        for path, value in sorted(self.wanted.items(), key=lambda item: -len(item[0])):  # the deepest first
            if path not in self.spans:
                at, new = self.insertion(path, value)
                edits[at, at] = edits.get((at, at), "") + new
        text = self.text
        for (start, end), new in sorted(edits.items(), reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def literal(self, value: Any) -> str:
        return spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        """(where, what) to insert for a key that is not there."""
        raise NotImplementedError

    def missing(self, path: Path) -> RuleError:
        return self.error(f"no {dotted(path)} is there, and no place for it: add `{path[-1]}` so that it can be set")

    def error(self, text: str) -> RuleError:
        return RuleError(f"{self.where}: {text}")


class Toml(Document):
    """tomlkit keeps everything of a file but the values that are set."""

    syntax = "toml"

    def parse(self) -> None:
        tomlkit = library("tomlkit")
        try:
            tree = tomllib.loads(self.text)  # fast, strict, and refuses keys that stand twice
            self._doc = tomlkit.parse(self.text)
        except (ValueError, tomlkit.exceptions.TOMLKitError) as e:
            raise RuleError(f"{self.where} cannot be read as TOML: {one_line(e)}") from None
        self._walk(tree, ())

    def _walk(self, value: Any, path: Path) -> None:
        nested = isinstance(value, list) and any(isinstance(v, dict | list) for v in value)
        if isinstance(value, dict) or nested:
            for key, member in value.items() if isinstance(value, dict) else enumerate(value):
                self._walk(member, (*path, key))
        elif isinstance(value, list):
            self.leaf(path, [number(v) for v in value])
        else:
            self.leaf(path, number(value) if isinstance(value, bool | int | float | str) else Odd("a date"))

    def set(self, path: Path, value: Any) -> None:
        self.wanted[path] = value
        at: Any = self._doc
        for i, key in enumerate(path):
            if isinstance(at, list) is not isinstance(key, int):
                raise self.missing(path)
            if i == len(path) - 1:
                at[key] = value
            elif isinstance(at, dict) and key not in at:
                at[key] = library("tomlkit").table()
            at = at[key]

    def written(self) -> str:
        text: str = self._doc.as_string()
        return text if self.newline == "\n" else re.sub(r"(?<!\r)\n", "\r\n", text)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_document(text: str, where: str) -> Document:
    """The document in the syntax that its name, or its first lines, say."""
    from scaling_exps.convert.flags import Flags
    from scaling_exps.convert.python import Python
    from scaling_exps.convert.yaml import Json, Yaml

    if len(text) > LIMIT or text.count("\n") > LINES:
        raise RuleError(f"{where} is longer than {LIMIT // 1024} kB or {LINES} lines, and a recipe is a few pages")
    if not text.strip():
        raise RuleError(f"{where} is empty")
    kinds: dict[str, type[Document]] = {".json": Json, ".toml": Toml, ".py": Python}
    kinds |= dict.fromkeys((".sh", ".bash", ".sbatch"), Flags)
    if (ending := File(where).suffix.lower()) in kinds:
        return kinds[ending](text, where)

    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    def any_line(pattern: str) -> bool:
        return any(re.match(pattern, line) for line in code)

    keyed = any_line(r"[\"']?[\w.-]+[\"']?\s*:(\s|$)")
    flagged = any_line(r".*?(^|\s)[\"']?(--[A-Za-z]|-[a-z] |\+{0,2}[A-Za-z_]\w*(\.\w+)+=\S)") and not keyed
    named_yaml = ending in (".yaml", ".yml")
    if text.lstrip("\ufeff \t\r\n")[:1] == "{" and not named_yaml:
        return Json(text, where)
    if not named_yaml and not keyed and any_line(r"\s*\[[\w.\s-]+\]\s*(#.*)?$"):
        return Toml(text, where)
    if flagged or keyed or named_yaml:
        return Flags(text, where) if flagged else Yaml(text, where)
    return Python(text, where) if any_line(r"(\w+\s*=[^=]|def \w|from \w|import \w)") else Yaml(text, where)
