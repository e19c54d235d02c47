"""A recipe that is Python source (nanoGPT's config files, torchtitan's registries): assignments and keyword arguments.

Nothing is run. Values are constants and arithmetic on them; all else is an Odd.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from scaling_exps.convert.documents import Document, Odd, Path, is_number, number, one_line, spell
from scaling_exps.rules import RuleError

_OPERATORS: dict[object, Callable[..., Any]] = {
    ast.USub: operator.neg,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class Python(Document):
    syntax = "python"

    def parse(self) -> None:
        try:
            tree = ast.parse(self.text)
        except (SyntaxError, ValueError, MemoryError) as e:
            raise RuleError(f"{self.where} cannot be read as Python: {one_line(e)}") from None
        self._lines = self.text.splitlines(keepends=True)
        self._names: dict[str, Any] = {}
        self._calls: dict[Path, ast.Call | ast.Dict] = {}
        several = sum(isinstance(n, ast.FunctionDef) for n in tree.body) > 1
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
            if value and len(targets) == 1 and isinstance(targets[0], ast.Name):
                self._walk(value, (targets[0].id,))
                self._names[targets[0].id] = self.values.get((targets[0].id,), Odd("an expression"))
            elif isinstance(node, ast.FunctionDef):
                for inner in node.body:
                    if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Call):
                        self._walk(inner.value, (node.name,) if several else ())
            elif isinstance(node, ast.Assign | ast.AugAssign | ast.For | ast.If | ast.While | ast.With):
                for name in ast.walk(node):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        self._names[name.id] = Odd("set by statements that are not followed")
                        self.leaf((name.id,), self._names[name.id], self._span(node))

    def _walk(self, node: ast.expr, path: Path) -> None:
        if isinstance(node, ast.Call | ast.Dict):
            self._calls[path] = node
            for key, value in _members(node):
                self._walk(value, (*path, key))
            return
        if path in self.values:
            self.twice.add(path)
        self.leaf(path, self._value(node), self._span(node))
        if isinstance(node, ast.List | ast.Tuple):
            self.spans |= {(*path, i): self._span(element) for i, element in enumerate(node.elts)}

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | str | None):
            return node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return number(node.value)
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(e) for e in node.elts]
        if isinstance(node, ast.Name):
            return self._names.get(node.id, Odd(f"the name {node.id}"))
        terms: list[Any] = []
        if isinstance(node, ast.UnaryOp):
            terms = [self._value(node.operand)]
        elif isinstance(node, ast.BinOp):
            terms = [self._value(node.left), self._value(node.right)]
        apply = _OPERATORS.get(type(getattr(node, "op", node)))
        if apply is None or not all(map(is_number, terms)):
            return Odd("an expression")
        if apply is operator.pow and abs(terms[1]) >= 100:
            return Odd("a power beyond all ranges")
        try:
            return number(apply(*terms))
        except ArithmeticError:
            return Odd("an expression without a value")

    def _span(self, node: Any) -> tuple[int, int]:
        def at(line: int, column: int) -> int:  # ast counts columns in bytes
            return sum(map(len, self._lines[: line - 1])) + len(self._lines[line - 1].encode()[:column].decode())

        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def literal(self, value: Any) -> str:
        return repr(value) if isinstance(value, bool | str | None) else spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        if len(path) == 1 and () not in self._calls:
            gap = "" if self.text.endswith("\n") else self.newline
            return len(self.text), f"{gap}{path[0]} = {self.literal(value)}{self.newline}"
        call = self._calls.get(path[:-1])
        if call is None:
            raise self.missing(path)
        if isinstance(call, ast.Call):
            members, key = [*call.args, *(k.value for k in call.keywords)], f"{path[-1]}="
        else:
            members, key = call.values, f"{path[-1]!r}: "
        end = max((self._span(e)[1] for e in members), default=self._span(call)[1] - 1)
        return end, f"{', ' if members else ''}{key}{self.literal(value)}"


def _members(node: ast.Call | ast.Dict) -> list[tuple[str, ast.expr]]:
    if isinstance(node, ast.Call):
        return [(k.arg, k.value) for k in node.keywords if k.arg]
    pairs = zip(node.keys, node.values, strict=True)
    return [(k.value, v) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(k.value, str)]
