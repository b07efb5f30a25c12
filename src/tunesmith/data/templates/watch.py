"""Watches a template at work on texts it cannot know, and says what it would ask of them.

A conversation whose texts are marks is rendered by a copy of the template that passes through here
whenever it compares, searches, cuts or loops. What it asks of a mark becomes a condition on the
text that stands in its place: "does not contain `</think>`", "is not `none`". Every text that meets
all conditions takes the same way through the template, so its render is that of the marks with the
texts filled in. Whatever cannot be put into such a condition (lengths, order, upper case, slices,
loops over characters) ends the watch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import nodes
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tunesmith.data.templates.sandbox import ChatTemplate

OPEN, CLOSE = "\ue000", "\ue001"
FIRST = 0xF0000
"""A mark is a number between two characters, all three for private use: they occur in no needle."""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}

SEARCHES = frozenset(
    (
        *("split", "rsplit", "partition", "rpartition", "replace", "find", "rfind", "count"),
        *("removeprefix", "removesuffix"),
    )
)
"""Methods of a text that do the same to every text without their first argument in it."""

TYPE_TESTS = frozenset(
    (
        *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean"),
        *("integer", "float", "number", "callable", "true", "false"),
    )
)
SHAPE_FILTERS = frozenset(("length", "count", "list", "first", "last", "reverse", "items", "join"))
"""Filters of lists that do not look at what is in them."""

EQUALS = {"eq": "eq", "==": "eq", "equalto": "eq", "ne": "ne", "!=": "ne"}


class OpaqueError(Exception):
    """The template does something with a text that no condition can express."""


@dataclass(slots=True)
class Conditions:
    """What a template asked of the texts, all with the answer no.

    Args:
        inside: pieces of text it searched.
        equal: whole texts it compared with.
        edges: characters it stripped from the ends.
    """

    inside: set[str] = field(default_factory=set[str])
    equal: set[str] = field(default_factory=set[str])
    edges: set[str] = field(default_factory=set[str])


_conditions: ContextVar[Conditions] = ContextVar("conditions")


@contextmanager
def watching() -> Generator[Conditions]:
    """Collects what a `WatchedTemplate` asks within this block."""
    conditions = Conditions()
    token = _conditions.set(conditions)
    try:
        yield conditions
    finally:
        _conditions.reset(token)


def mark(number: int) -> str:
    """The text that stands for text `number`."""
    return f"{OPEN}{chr(FIRST + number)}{CLOSE}"


class WatchedTemplate(ChatTemplate):
    """A template that calls the functions below before it looks at a value."""

    def __init__(self, template: ChatTemplate, source: str) -> None:
        environment = template._template.environment
        tree = environment.parse(source)
        _Rewriter().visit(tree)
        super().__init__(environment.from_string(tree), template._limits)


def watch_template(template: ChatTemplate, source: str) -> WatchedTemplate | None:
    """A copy to be watched; None where the rewritten one is too deep for Python's compiler."""
    try:
        return WatchedTemplate(template, source)
    except (RecursionError, SyntaxError, ValueError, MemoryError):
        return None


class _Rewriter(NodeTransformer):
    """Puts a call of this module around what could tell one text from another."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        if len(node.ops) > 1:
            return _call(refuse)
        if _asks_for_emptiness(node):
            length = cast("nodes.Filter", node.expr)
            length.node = self.visit(cast("nodes.Expr", length.node))
            return node
        self.generic_visit(node)
        return _call(compare, nodes.Const(node.ops[0].op), node.expr, node.ops[0].expr)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not _is_key(node.arg):
            node.node = _call(look, node.node)
            if not isinstance(node.arg, nodes.Slice):
                node.arg = _call(look, node.arg)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        arguments = _arguments(node)
        called = node.node
        if arguments is None:
            node.node = _call(refuse)
        elif isinstance(called, nodes.Getattr):
            called.node = _call(own, called.node, nodes.Const(called.attr), arguments)
        elif isinstance(called, nodes.Getitem) and isinstance(called.arg, nodes.Const):
            called.node = _call(own, called.node, called.arg, arguments)
        elif not isinstance(called, nodes.ExtensionAttribute):
            node.node = _call(callee, called, arguments)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        return self._before(node, filtered)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        return self._before(node, tested)

    def _before(self, node: nodes.Filter | nodes.Test, function: Callable[..., Any]) -> nodes.Node:
        arguments = _arguments(node)
        if arguments is None or node.node is None:
            return _call(refuse)
        names = nodes.List([nodes.Const(pair.key) for pair in node.kwargs])
        node.node = _call(function, node.node, nodes.Const(node.name), arguments, names)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call(look, cast("nodes.Expr", node.iter))
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.Tuple):
            node.node = _call(look, cast("nodes.Expr", node.node))
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self.generic_visit(node) if node.filter is None else nodes.Output([_call(refuse)])

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        return nodes.Output([_call(refuse)])

    visit_FilterBlock = visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refuse

    def _look_at_both(self, node: nodes.BinExpr) -> nodes.Node:
        self.generic_visit(node)
        node.left, node.right = _call(look_through, node.left), _call(look_through, node.right)
        return node

    visit_Mod = visit_Mul = _look_at_both


def _call(function: Callable[..., Any], *arguments: nodes.Expr) -> nodes.Call:
    name = nodes.ImportedName(f"{__name__}.{function.__name__}")
    return nodes.Call(name, list(arguments), [], None, None)


def _arguments(node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.List | None:
    """All arguments as one list; None if some are unpacked from a variable."""
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return None
    return nodes.List([*node.args, *(pair.value for pair in node.kwargs)])


def _is_key(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _asks_for_emptiness(node: nodes.Compare) -> bool:
    """Whether this is `x | length > 0` and the like: no text here is empty."""
    (operand,) = node.ops
    return (
        isinstance(node.expr, nodes.Filter)
        and node.expr.name in ("length", "count")
        and node.expr.node is not None
        and operand.op in ("gt", "ne", "eq")
        and isinstance(operand.expr, nodes.Const)
        and operand.expr.value == 0
    )


# What the rewritten template calls; each gives back the value or raises OpaqueError


def refuse() -> None:
    """Stands in the place of what is not watched."""
    raise OpaqueError


def look(value: Any) -> Any:
    """A value whose items or characters are about to be taken."""
    if isinstance(value, str) and OPEN in value:
        raise OpaqueError
    return value


def look_through(value: Any) -> Any:
    """A value that must have nothing to do with a text."""
    if has_mark(value):
        raise OpaqueError
    return value


def compare(name: str, left: Any, right: Any) -> Any:
    """Any comparison, and `in`."""
    if name in ("in", "notin"):
        if has_mark(left) or has_mark(right):
            _ask_membership(left, right)
        return (left in right) == (name == "in")
    if has_mark(left) or has_mark(right):
        _ask_equality(name, left, right)
    return COMPARISONS[name](left, right)


def own(owner: Any, name: str, arguments: list[Any]) -> Any:
    """The owner of a method that is about to be called."""
    if isinstance(owner, str) and OPEN in owner:
        _ask_method(owner, name, arguments)
    elif has_mark(arguments):
        is_join = isinstance(owner, str) and name == "join"
        is_get = isinstance(owner, dict) and name == "get" and not has_mark(arguments[0])
        if not is_join and not is_get:
            raise OpaqueError
    return owner


def callee(function: Any, arguments: list[Any]) -> Any:
    """A function that is about to be called: macros are watched themselves."""
    if isinstance(function, MethodType | BuiltinMethodType):
        look_through(function.__self__)
    is_namespace = isinstance(function, type) and issubclass(function, Namespace)
    if not isinstance(function, Macro) and not is_namespace:
        look_through(arguments)
    return function


def filtered(value: Any, name: str, arguments: list[Any], names: list[str]) -> Any:
    """A value before a filter."""
    if name in ("safe", "e", "escape", "forceescape"):
        # What is once marked as safe escapes every text that it is added to.
        raise OpaqueError
    if name in ("default", "d") or not (has_mark(value) or has_mark(arguments)):
        return value
    if isinstance(value, str) and OPEN in value:
        if name in ("trim", "replace"):
            _ask_method(value, {"trim": "strip"}.get(name, name), arguments)
        elif name != "string":
            raise OpaqueError
    elif isinstance(value, str):
        raise OpaqueError
    elif name in ("selectattr", "rejectattr"):
        _ask_items(value, arguments)
    elif name not in SHAPE_FILTERS and not (name == "map" and names == ["attribute"]):
        raise OpaqueError
    return value


def tested(value: Any, name: str, arguments: list[Any], names: list[str]) -> Any:
    """A value before a test."""
    if name in TYPE_TESTS or not (has_mark(value) or has_mark(arguments)):
        return value
    if name in EQUALS and len(arguments) == 1:
        _ask_equality(EQUALS[name], value, arguments[0])
    elif name == "in" and len(arguments) == 1:
        _ask_membership(value, arguments[0])
    elif name != "sameas" or has_mark(arguments) or isinstance(arguments[0], str):
        raise OpaqueError
    return value


# Conditions


def has_mark(value: Any) -> bool:
    """Whether a text is in a value; what cannot be looked into may have one."""
    if isinstance(value, str):
        return OPEN in value
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        return any(has_mark(item) for pair in pairs.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return any(has_mark(item) for item in cast("Sequence[Any]", value))
    return not isinstance(value, int | float | range | Undefined | Macro | None)


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 3 and value[0] == OPEN


def _search(text: str, piece: Any) -> None:
    """The text is asked for a piece, which must be known."""
    if not isinstance(piece, str) or OPEN in piece or not _is_mark(text) or piece in text:
        raise OpaqueError
    _conditions.get().inside.add(piece)


def _ask_equality(name: str, left: Any, right: Any) -> None:
    if name not in ("eq", "ne"):
        raise OpaqueError
    if not isinstance(left, str) or not isinstance(right, str):
        if isinstance(left, str | None) or isinstance(right, str | None):
            return  # a text is no list, whatever it says
        raise OpaqueError
    text, other = (left, right) if _is_mark(left) else (right, left)
    if not _is_mark(text) or (OPEN in other and other != text):
        raise OpaqueError
    if other != text:
        _conditions.get().equal.add(other)


def _ask_membership(item: Any, container: Any) -> None:
    if isinstance(container, str):
        if item == "":
            return
        _search(container, item)
    elif isinstance(container, Mapping):
        _ask_membership(item, list(cast("Mapping[Any, Any]", container)))
    elif isinstance(container, list | tuple | set | frozenset):
        for other in cast("Sequence[Any]", container):
            if has_mark(other) or has_mark(item):
                _ask_equality("eq", item, other)
    else:
        raise OpaqueError


def _ask_method(text: str, name: str, arguments: list[Any]) -> None:
    if name == "join":
        return
    if has_mark(arguments):
        raise OpaqueError
    if name in ("strip", "lstrip", "rstrip"):
        _conditions.get().edges.update(*[chars for chars in arguments if chars is not None])
    elif name in ("startswith", "endswith") and len(arguments) == 1:
        pieces = arguments[0] if isinstance(arguments[0], tuple) else arguments
        for piece in cast("Sequence[Any]", pieces):
            _search(text, piece)
    elif name in SEARCHES and arguments:
        _search(text, arguments[0])
    else:
        raise OpaqueError


def _ask_items(value: Any, arguments: list[Any]) -> None:
    """A choice of items by one of their keys, which must have nothing to do with a text."""
    if not isinstance(value, list | tuple) or not arguments or has_mark(arguments):
        raise OpaqueError
    for item in cast("Sequence[Any]", value):
        if not isinstance(item, Mapping):
            raise OpaqueError
        look_through(cast("Mapping[Any, Any]", item).get(arguments[0]))
