"""A recipe that is Python source (nanoGPT's config files, torchtitan's registries): assignments and keyword arguments.

Nothing is run. Values are constants and arithmetic on them; all else is an Odd.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

from scaling_exps.convert.documents import Document, Odd, Path, finite, one_line, spell
from scaling_exps.rules import RuleError

_OPERATORS: dict[type[ast.operator], Any] = {
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
        lines = self.text.splitlines(keepends=True)
        self._lines = [line.encode() for line in lines]
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._names: dict[str, Any] = {}
        self._calls: dict[Path, ast.Call | ast.Dict] = {}
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self._walk(node.value, (node.targets[0].id,))
                self._names[node.targets[0].id] = self.values.get((node.targets[0].id,), Odd("an expression"))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._walk(node.value, (node.target.id,))
                self._names[node.target.id] = self.values.get((node.target.id,), Odd("an expression"))
            elif isinstance(node, ast.FunctionDef):
                for inner in node.body:
                    if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Call):
                        self._walk(inner.value, (node.name,) if len(functions) > 1 else ())
            elif isinstance(node, ast.Assign | ast.AugAssign | ast.For | ast.If | ast.While | ast.With):
                for name in ast.walk(node):  # set in ways that are not followed
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        self.leaf((name.id,), Odd("set by statements that are not followed"), self._span(node))

    def _walk(self, node: ast.expr, path: Path) -> None:
        members: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Call):
            members = [(k.arg, k.value) for k in node.keywords if k.arg]
        elif isinstance(node, ast.Dict):
            members = [
                (k.value, v)
                for k, v in zip(node.keys, node.values, strict=True)
                if isinstance(k, ast.Constant) and isinstance(k.value, str)
            ]
        if isinstance(node, ast.Call | ast.Dict):
            self._calls[path] = node
            for key, value in members:
                self._walk(value, (*path, key))
            return
        if path in self.values:
            self.twice.add(path)
        self.leaf(path, self._value(node), self._span(node))
        if isinstance(node, ast.List | ast.Tuple):
            for i, element in enumerate(node.elts):
                self.spans[(*path, i)] = self._span(element)

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or node.value is None or isinstance(node.value, str):
                return node.value
            return finite(node.value) if isinstance(node.value, int | float) else Odd("an expression")
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(e) for e in node.elts]
        if isinstance(node, ast.Name):
            return self._names.get(node.id, Odd(f"the name {node.id}"))
        numbers: list[Any] = []
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            numbers = [0, self._value(node.operand)]
            apply = operator.sub
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            numbers = [self._value(node.left), self._value(node.right)]
            apply = _OPERATORS[type(node.op)]
            if isinstance(node.op, ast.Pow) and not (_is(numbers[1]) and abs(numbers[1]) < 100):
                return Odd("a power beyond all ranges")
        if not numbers or not all(map(_is, numbers)):
            return Odd("an expression")
        try:
            return finite(apply(*numbers))
        except (ArithmeticError, ValueError):
            return Odd("an expression without a value")

    def _span(self, node: ast.AST) -> tuple[int, int]:
        def at(line: int, column: int) -> int:
            return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def literal(self, value: Any) -> str:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return repr(value)
        return spell(value)

    def insertion(self, path: Path, value: Any) -> tuple[int, str]:
        if len(path) == 1 and () not in self._calls:
            gap = "" if self.text.endswith("\n") else self.newline
            return len(self.text), f"{gap}{path[0]} = {self.literal(value)}{self.newline}"
        call = self._calls.get(path[:-1])
        if call is None:
            raise self.missing(path)
        last = [k.value for k in call.keywords] if isinstance(call, ast.Call) else call.values
        if isinstance(call, ast.Call):
            last = [*call.args, *last]
        end = max((self._span(e)[1] for e in last), default=self._span(call)[1] - 1)
        key = f"{path[-1]}=" if isinstance(call, ast.Call) else f"{path[-1]!r}: "
        return end, f"{', ' if last else ''}{key}{self.literal(value)}"


def _is(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
