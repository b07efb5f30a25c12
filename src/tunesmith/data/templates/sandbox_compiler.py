"""Compiles chat templates into code that counts what it writes, loops over, adds and compares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators, optimizeconst
from jinja2.runtime import Context

from tunesmith.data.templates.sandbox_budget import Budget


class BudgetContext(Context):
    """A render's variables, with its budget where the compiled code finds it."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        """The context of an inner scope, on the same budget."""
        inner = cast("BudgetContext", super().derived(locals))
        inner.budget = self.budget
        return inner


DICT_METHODS = frozenset(dir(dict))


class CountingCode(CodeGenerator):
    """Compiles a template into code that counts what it does."""

    _verb = "show"
    _loop_body: list[nodes.Node] | None = None

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Each turn of a loop is a step."""
        self._loop_body = node.body
        super().visit_For(node, frame)

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """Statements in a row; only a loop's need a count before them."""
        if nodes is self._loop_body:
            self.writeline("context.budget.tick()")
        super().blockvisit(nodes, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        """What is written counts, as output or as the text of a macro or block."""
        self._verb = "show" if frame.buffer is None else "hold"
        self._finalize = self._FinalizeInfo(str, f"context.budget.{self._verb}(")
        super().visit_Output(node, frame)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"context.budget.{self._verb}({super()._output_const_repr(group)})"

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """The operator `~`, in one call."""
        function = "str_join"
        if frame.eval_ctx.volatile:
            function = "(markup_join if context.eval_ctx.autoescape else str_join)"
        elif frame.eval_ctx.autoescape:
            function = "markup_join"
        self.write(f"context.budget.join({function}, (")
        self._visit_all(node.nodes, frame)
        self.write("))")

    @optimizeconst
    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:
        """A whole chain `a + b + c` is one call."""
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.insert(0, left.right)
            left = left.left
        self.write("context.budget.add(")
        self._visit_all([left, *parts], frame)
        self.write(")")

    @optimizeconst
    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Two lists may take long to compare; with a constant on one side it never does."""
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        is_counted = not any(isinstance(side, nodes.Const) for side in sides)
        before = ["", *(f" {operators[operand.op]} " for operand in node.ops)]
        self.write("(")
        for symbol, side in zip(before, sides, strict=True):
            self.write(symbol + ("context.budget.compared(" if is_counted else "("))
            self.visit(side, frame)
            self.write(")")
        self.write(")")

    @optimizeconst
    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:
        """A message's key is read straight from its dict."""
        is_key = node.attr not in DICT_METHODS
        is_open = is_key and self._open_shortcut(node.node, node.attr, frame)
        super().visit_Getattr(node, frame)
        self.write(")" if is_open else "")

    @optimizeconst
    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Likewise; a slice is a copy and counts."""
        if isinstance(node.arg, nodes.Slice):
            self.write("context.budget.made(")
            is_open = True
        else:
            key = node.arg.value if isinstance(node.arg, nodes.Const) else None
            is_open = isinstance(key, str) and self._open_shortcut(node.node, key, frame)
        super().visit_Getitem(node, frame)
        self.write(")" if is_open else "")

    def _open_shortcut(self, owner: nodes.Expr, key: str, frame: Frame) -> bool:
        """Begins `(owner[key] if that is in the dict else `, where the owner is a variable."""
        if not isinstance(owner, nodes.Name) or owner.name in ("varargs", "kwargs"):
            return False
        name = frame.symbols.ref(owner.name)
        self.write(f"({name}[{key!r}] if type({name}) is dict and {key!r} in {name} else ")
        return True

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """A list of other values may hold the same one often."""
        self._visit_container(node, node.items, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """So may a dict."""
        self._visit_container(node, [pair.value for pair in node.items], frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """So may a tuple, unless it stands on the left of an assignment."""
        self._visit_container(node, [] if node.ctx == "store" else node.items, frame)

    def _visit_container(self, node: nodes.Expr, items: Sequence[nodes.Node], frame: Frame) -> None:
        is_counted = not all(isinstance(item, nodes.Const) for item in items)
        if is_counted:
            self.write("context.budget.built(")
        getattr(super(), f"visit_{type(node).__name__}")(node, frame)
        if is_counted:
            self.write(")")

    def visit_Name(self, node: nodes.Name, frame: Frame) -> None:
        """A macro's surplus arguments are a container that no literal shows."""
        is_surplus = node.ctx == "load" and node.name in ("varargs", "kwargs")
        self.write("context.budget.built(" if is_surplus else "")
        super().visit_Name(node, frame)
        self.write(")" if is_surplus else "")

    def _visit_all(self, parts: Sequence[nodes.Expr], frame: Frame) -> None:
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
