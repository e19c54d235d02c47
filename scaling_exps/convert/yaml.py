"""YAML through ruamel.yaml's nodes: each knows where it stands, so comments, anchors and quotes are never touched."""

from __future__ import annotations

import json
import re
from typing import Any

from scaling_exps.convert.documents import DEPTH, Document, Odd, Path, dotted, library, number, one_line, spell
from scaling_exps.rules import RuleError

_CORE = "tag:yaml.org,2002:"
_WORDS = {"yes": True, "on": True, "no": False, "off": False, "y": True, "n": False}  # booleans of YAML 1.1


class Yaml(Document):
    syntax = "yaml"

    def parse(self) -> None:
        ruamel = library("ruamel.yaml")
        try:
            root = ruamel.YAML(typ="safe", pure=True).compose(self.text)
        except ruamel.error.YAMLError as e:
            raise RuleError(f"{self.where} cannot be read as YAML: {one_line(e)}") from None
        except (ValueError, AttributeError) as e:  # what ruamel says of impossible escapes and characters
            raise RuleError(f"{self.where} cannot be read as YAML: {one_line(e)}") from None
        if root is None or root.id != "mapping":
            raise RuleError(f"{self.where}: the top level must be keys and values, as in `lr: 0.001`")
        self._maps: dict[Path, Any] = {}
        self._walk(root, (), ())

    def _walk(self, node: Any, path: Path, above: tuple[int, ...], colon: int = 0) -> None:
        if id(node) in above:
            raise RuleError(f"{self.where}: {dotted(path)} holds itself (an alias inside its own anchor)")
        if len(path) > DEPTH:
            raise RuleError(f"{self.where} is nested more than {DEPTH} deep; no recipe is")
        above = (*above, id(node))
        if node.tag not in {_CORE + t for t in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}:
            if node.tag == _CORE + "python/tuple" and node.id == "sequence":  # how Lightning saves betas
                pass
            elif node.id != "scalar":
                raise RuleError(f"{self.where}: {dotted(path)} has the tag {node.tag}, and what it makes is not known")
        span = (node.start_mark.index, node.end_mark.index)
        if span[0] == span[1]:  # an empty value: its own marks stand at the next key
            span = (colon, colon)
        if node.id == "mapping":
            self._maps[path] = node
            for key, value, colon in self._members(node, path):
                self._walk(value, (*path, key), above, colon)
        elif node.id == "sequence" and any(v.id != "scalar" for v in node.value):
            for i, value in enumerate(node.value):
                self._walk(value, (*path, i), above)
        elif node.id == "sequence":
            self.leaf(path, [self._scalar(v) for v in node.value], span)
            for i, value in enumerate(node.value):
                self.spans[(*path, i)] = _bare(value)
        else:
            self.leaf(path, self._scalar(node), span)

    def _members(self, node: Any, path: Path) -> list[tuple[str, Any, int]]:
        """Keys, values and the ends of colons, those that come in by `<<` included; the mapping's own go first."""
        own: dict[str, tuple[Any, int]] = {}
        merged: dict[str, tuple[Any, int]] = {}
        for key, value in node.value:
            if key.tag == _CORE + "merge":
                for part in [value] if value.id == "mapping" else value.value:
                    if part.id != "mapping" or part is node:
                        raise RuleError(f"{self.where}: `<<` in {dotted(path) or 'the file'} must name a mapping")
                    self._depth = getattr(self, "_depth", 0) + 1
                    if self._depth > 1000:
                        raise RuleError(f"{self.where}: too many merge keys, or one that holds itself")
                    for k, v, colon in self._members(part, path):
                        merged.setdefault(k, (v, colon))
            elif key.id != "scalar":
                raise RuleError(f"{self.where}: a key of {dotted(path) or 'the file'} is no word; recipes have words")
            elif key.value in own:
                raise RuleError(
                    f"{self.where}: {dotted((*path, key.value))} stands there twice (line "
                    f"{key.start_mark.line + 1}); "
                    "which one counts?"
                )
            else:
                own[key.value] = (value, self.text.find(":", key.end_mark.index) + 1)
        return [(k, v, colon) for k, (v, colon) in {**merged, **own}.items()]

    def _scalar(self, node: Any) -> Any:
        kind, text = node.tag.removeprefix(_CORE), node.value
        plain = node.style in (None, "")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "timestamp":
            return Odd(f"the date {text}")
        if kind in ("str", "int", "float"):
            if plain and text.lower() in _WORDS:
                return _WORDS[text.lower()]
            value = number(text)
            if kind == "str" or isinstance(value, int | float | Odd):
                return value
            return Odd(f"{text} ({kind})")  # .inf, 0x10
        return Odd(f"{text} with the tag {node.tag}")

    def literal(self, value: Any) -> str:
        return (
            json.dumps(value)
            if isinstance(value, str) and not re.match(r"[\w=.,+/-]+$", value)
            else (value if isinstance(value, str) else spell(value))
        )

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        parent = path[:-1]
        key = f"{path[-1]}: {self.literal(value)}"
        while parent not in self._maps:  # a section of its own, in braces
            if not parent or parent in self.spans:
                raise self.missing(path)
            key, parent = f"{parent[-1]}: {{{key}}}", parent[:-1]
        node = self._maps[parent]
        own = [(k, v) for k, v in node.value]
        if not own:
            return node.start_mark.index + 1, key
        end = max(_end(v) if _end(v) > k.end_mark.index else k.end_mark.index for k, v in own)
        if node.flow_style:
            return end, f", {key}"
        at = self.text.find("\n", max(end - 1, 0))
        if at > 0 and self.text[at - 1] == "\r":
            at -= 1
        at = len(self.text) if at < 0 else at
        return at, f"{self.newline}{' ' * min(k.start_mark.column for k, _ in own)}{key}"


def _bare(node: Any) -> tuple[int, int]:
    return (node.start_mark.index, node.end_mark.index)


def _end(node: Any) -> int:
    """Where the last character of a node stands: a block's own end mark lies behind the comments that follow it."""
    if node.id == "scalar" or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1]) if isinstance(last, tuple) else _end(last)
