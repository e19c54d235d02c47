"""YAML through ruamel.yaml's nodes, which know where they stand: comments, anchors and quotes are never touched.

JSON is read as the YAML that it is, after json has found it right.
"""

from __future__ import annotations

import json
import re
from typing import Any

from scaling_exps.convert.documents import LEAVES, Document, Odd, Path, dotted, library, number, one_line, spell

_CORE = "tag:yaml.org,2002:"
_TAGS = {_CORE + t for t in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}
_WORDS = {"yes": True, "on": True, "no": False, "off": False, "y": True, "n": False}  # booleans of YAML 1.1


class Yaml(Document):
    syntax = "yaml"
    _quote = ""  # around a new key

    def parse(self, text: str = "") -> None:
        ruamel = library("ruamel.yaml")
        try:
            root = ruamel.YAML(typ="safe", pure=True).compose(text or self.text)
        except (ruamel.error.YAMLError, ValueError, AttributeError) as e:  # the last two: impossible escapes
            raise self.error(f"it cannot be read as YAML: {one_line(e)}") from None
        self._maps: dict[Path, Any] = {}
        self._visits = 0
        if root is not None and root.id == "mapping":
            self._walk(root, (), ())
        for path, value in self.values.items():  # OmegaConf's `${a.b}`, where the file holds a.b
            named = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
            there = tuple(named[1].split(".")) if named else ()
            if there in self.spans and not isinstance(self.values.get(there, ""), str):
                self.values[path], self.spans[path] = self.values[there], self.spans[there]

    def _walk(self, node: Any, path: Path, above: tuple[int, ...], colon: int = 0) -> None:
        if id(node) in above:
            raise self.error(f"{dotted(path)} holds itself (an alias inside its own anchor)")
        self._visit()
        above = (*above, id(node))
        betas = node.tag == _CORE + "python/tuple" and node.id == "sequence"  # as Lightning saves them
        if node.tag not in _TAGS and node.id != "scalar" and not betas:
            raise self.error(f"{dotted(path)} has the tag {node.tag}, and what it makes is not known")
        if node.id == "mapping":
            self._maps[path] = node
            for key, (value, end) in self._members(node, path).items():
                self._walk(value, (*path, key), above, end)
        elif node.id == "sequence" and any(v.id != "scalar" for v in node.value):
            for i, value in enumerate(node.value):
                self._walk(value, (*path, i), above)
        else:
            start, end = span = self._span(node)
            many = node.id == "sequence"
            value = [self._scalar(v) for v in node.value] if many else self._scalar(node)
            # an empty value's own marks stand at the next key
            self.leaf(path, value, span if start < end else (colon, colon))
            if many:
                self.spans |= {(*path, i): self._span(v) for i, v in enumerate(node.value)}

    def _span(self, node: Any) -> tuple[int, int]:
        """Where a value stands, behind its anchor and its tag."""
        start, end = node.start_mark.index, node.end_mark.index
        before = re.match(r"([&!]\S+\s+)*", self.text[start:end])
        return start + len(before[0] if before else ""), end

    def _members(self, node: Any, path: Path) -> dict[str, tuple[Any, int]]:
        """Values and the ends of their colons, those that come in by `<<` included; the mapping's own go first."""
        self._visit()
        where = dotted(path) or "the file"
        own: dict[str, tuple[Any, int]] = {}
        merged: dict[str, tuple[Any, int]] = {}
        for key, value in node.value:
            if key.tag == _CORE + "merge":
                for part in value.value if value.id == "sequence" else [value]:
                    if part.id != "mapping" or part is node:
                        raise self.error(f"`<<` in {where} must name a mapping")
                    merged = {**self._members(part, path), **merged}
            elif key.id != "scalar":
                raise self.error(f"a key of {where} is no word; recipes have words")
            elif key.value in own:
                line = key.start_mark.line + 1
                raise self.error(f"{dotted((*path, key.value))} stands there twice (line {line}); which one counts?")
            else:
                own[key.value] = (value, self.text.find(":", key.end_mark.index) + 1)
        return {**merged, **own}

    def _visit(self) -> None:
        """Count a node, or a mapping that is merged in: aliases can make many of few."""
        self._visits += 1
        if self._visits > 2 * LEAVES:
            raise self.error(f"more than {2 * LEAVES} values, mappings and merge keys, or one that holds itself")

    def _scalar(self, node: Any) -> Any:
        kind, text = node.tag.removeprefix(_CORE), node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "timestamp":
            return Odd(f"the date {text}")
        if kind not in ("str", "int", "float"):
            return Odd(f"{text} with the tag {node.tag}")
        if node.style in (None, "") and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        value = number(text)
        return value if kind == "str" or value is not text else Odd(f"{text} ({kind})")  # .inf, 0x10

    def literal(self, value: Any) -> str:
        if not isinstance(value, str):
            return spell(value)
        return value if not self._quote and re.match(r"[\w=.,+/-]+$", value) else json.dumps(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        parent, quote = path[:-1], self._quote
        key = f"{quote}{path[-1]}{quote}: {self.literal(value)}"
        while parent not in self._maps:  # a section of its own, in braces
            if not parent or parent in self.spans:
                raise self.missing(path)
            key, parent = f"{quote}{parent[-1]}{quote}: {{{key}}}", parent[:-1]
        node = self._maps[parent]
        if not node.value:
            return node.start_mark.index + 1, key
        end = max(_end(v) if _end(v) > k.end_mark.index else k.end_mark.index for k, v in node.value)
        if node.flow_style:
            _, broken, indent = self.text[: node.value[-1][0].start_mark.index].rpartition("\n")
            gap = self.newline + indent if broken and not indent.strip() else " "
            return end, f",{gap}{key}"
        at = self.text.find("\n", max(end - 1, 0))
        at = len(self.text) if at < 0 else at - (self.text[at - 1] == "\r")
        return at, f"{self.newline}{' ' * min(k.start_mark.column for k, _ in node.value)}{key}"


class Json(Yaml):
    syntax = "json"
    _quote = '"'

    def parse(self, text: str = "") -> None:
        try:
            json.loads(self.text.removeprefix("\ufeff"))
        except ValueError as e:  # its own errors, and more digits than Python will read
            raise self.error(f"it cannot be read as JSON: {e}") from None
        super().parse(self.text.replace("\t", " "))  # YAML wants no tabs; no string of JSON holds one


def _end(node: Any) -> int:
    """Where the last character of a node stands: a block's own end mark lies behind the comments that follow it."""
    if node.id == "scalar" or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)
