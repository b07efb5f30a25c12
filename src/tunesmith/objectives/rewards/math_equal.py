"""Whether two mathematical answers are the same, without simplifying either.

Expressions with variables are compared by their values at fixed points (identity testing as of
Schwartz and Zippel, with floats): two that agree to 1e-9 at eight unrelated points are taken for
equal. That needs no time limit, gives the same verdict on every machine, and takes under a
millisecond, where sympy's `simplify` has neither a bound nor a worker that could be stopped at one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from tunesmith.objectives.rewards.math_parse import parse
from tunesmith.objectives.rewards.math_tree import (
    INFINITY,
    Apply,
    Group,
    Node,
    NotMathError,
    Number,
    Relation,
    Symbol,
    Value,
    Words,
    evaluate,
    free_symbols,
    walk,
)

NUM_POINTS = 8
MIN_POINTS = 3
"""Where both must have a value, for a verdict."""
RELATIVE = 1e-9
ABSOLUTE = 1e-12
"""How far floats may be apart: both sides were computed in double precision."""
MAX_UNORDERED = 20
"""Values of a set that are matched with those of another."""

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def is_same_answer(answer: str, reference: str, *, tolerance: float = 1e-6) -> bool:
    """Whether two answers mean the same: as mathematics if both are, else as texts.

    Args:
        answer: without the words around it, see `math_extract`.
        reference: likewise.
        tolerance: relative; applies where a decimal number is written, which may be rounded.
    """
    if _plain_text(answer) == _plain_text(reference):
        return bool(_plain_text(answer))
    left, right = parsed(answer), parsed(reference)
    if left is None or right is None:
        return False
    return _Comparison(tolerance).is_same(left, right)


@lru_cache(maxsize=8192)
def parsed(text: str) -> Node | None:
    """The tree of a text, None if it is no mathematics."""
    try:
        return parse(text)
    except NotMathError:
        return None


def _plain_text(text: str) -> str:
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]+", "", text).strip(".,。，;:!*").casefold()


class _Comparison:
    """The rules of equality, with the tolerance for rounded numbers."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = Fraction(repr(tolerance))

    def is_same(self, left: Node, right: Node) -> bool:
        left, right = _as_interval(left), _as_interval(right)
        if isinstance(left, Relation) and isinstance(right, Relation):
            return self._same_relations(left, right)
        left, right = _right_side(left), _right_side(right)
        if isinstance(left, Group) or isinstance(right, Group):
            return self._same_groups(_as_group(left), _as_group(right))
        if isinstance(left, Words) or isinstance(right, Words):
            return isinstance(left, Words) and isinstance(right, Words) and _same_words(left, right)
        if isinstance(left, Relation) or isinstance(right, Relation):
            return False
        if self._same_numbers(left, right):
            return True
        # 50% is meant by 0.5 and by 50, but 50% is not 0.5%.
        has_one_percent = _is_percent(left) != _is_percent(right)
        return has_one_percent and self._same_numbers(
            _without_percent(left), _without_percent(right)
        )

    def _same_numbers(self, left: Node, right: Node) -> bool:
        if _infinite_sign(left) or _infinite_sign(right):
            return _infinite_sign(left) == _infinite_sign(right)
        pairs = list(_values(left, right, free_symbols(left) | free_symbols(right)))
        if not pairs:
            return left == right
        is_rounded = any(
            isinstance(part, Number) and part.is_decimal for part in (*walk(left), *walk(right))
        )
        return all(self._near(one, other, is_rounded) for one, other in pairs)

    def _near(self, left: Value, right: Value, is_rounded: bool) -> bool:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            if not is_rounded:
                return left == right
            return abs(left - right) <= self.tolerance * max(abs(left), abs(right))
        relative = max(RELATIVE, float(self.tolerance)) if is_rounded else RELATIVE
        try:
            one, other = complex(left), complex(right)
        except OverflowError:
            return False
        return abs(one - other) <= max(relative * max(abs(one), abs(other)), ABSOLUTE)

    def _same_groups(self, left: Group, right: Group) -> bool:
        if len(left.items) != len(right.items) or not _kinds_fit(left.kind, right.kind):
            return False
        ordered = {left.kind, right.kind} - {"set", "union", "list"}
        if ordered:
            pairs = zip(left.items, right.items, strict=True)
            return all(self.is_same(one, other) for one, other in pairs)
        return self._same_in_any_order(left.items, right.items)

    def _same_in_any_order(self, left: Sequence[Node], right: Sequence[Node]) -> bool:
        if len(left) > MAX_UNORDERED:
            return all(self.is_same(one, other) for one, other in zip(left, right, strict=True))
        rest = list(right)
        for item in left:
            found = next((other for other in rest if self.is_same(item, other)), None)
            if found is None:
                return False
            rest.remove(found)
        return True

    def _same_relations(self, left: Relation, right: Relation) -> bool:
        """Equations and inequalities whose differences of sides are multiples of each other."""
        left, right = _not_descending(left), _not_descending(right)
        if left.signs != right.signs:
            return False
        if _has_name(left) and _has_name(right) and left.sides[0] == right.sides[0]:
            return self.is_same(left.sides[-1], right.sides[-1])
        if _is_solved(left) != _is_solved(right):
            return False  # the equation of a question, repeated, is not its solution
        if len(left.signs) != 1:
            pairs = zip(left.sides, right.sides, strict=True)
            return all(self.is_same(one, other) for one, other in pairs)
        one, other = _difference(left), _difference(right)
        names = free_symbols(one)
        if not names or names != free_symbols(other):
            return False
        ratios = [
            complex(first) / complex(second)
            for first, second in _values(one, other, names)
            if abs(second) > ABSOLUTE
        ]
        if len(ratios) < MIN_POINTS or abs(ratios[0]) < ABSOLUTE:
            return False
        is_kept = left.signs[0] == "=" or ratios[0].real > 0
        return is_kept and all(abs(ratio - ratios[0]) <= 1e-8 * abs(ratio) for ratio in ratios)


def _values(left: Node, right: Node, names: frozenset[str]) -> Iterator[tuple[Value, Value]]:
    """The values of both at the points where both have one; none at all if there are too few."""
    pairs: list[tuple[Value, Value]] = []
    for number in range(NUM_POINTS if names else 1):
        point = {name: _coordinate(name, number) for name in names}
        try:
            pairs.append((evaluate(left, point), evaluate(right, point)))
        except NotMathError:
            continue
    if len(pairs) >= (MIN_POINTS if names else 1):
        yield from pairs


def _coordinate(name: str, number: int) -> float:
    """A value between 0.3 and 2.3, of either sign, that only depends on the variable's name."""
    drawn = zlib.crc32(f"{name}:{number}".encode())
    return (-1) ** number * (0.3 + 2 * drawn / 2**32)


def _kinds_fit(left: str, right: str) -> bool:
    """Values without brackets are compared with any that have some."""
    return left == right or (
        "list" in (left, right) and not {left, right} & {"union", "matrix", "row"}
    )


def _as_group(node: Node) -> Group:
    return node if isinstance(node, Group) else Group("list", (node,))


def _has_name(relation: Relation) -> bool:
    r"""Whether it says what a name stands for: `x = 5`, `f(x) = 2x`, `x \in [1, 2]`."""
    left = relation.sides[0]
    parts = left.parts if isinstance(left, Apply) and left.name == "mul" else (left,)
    is_name = all(isinstance(part, Symbol | Words) for part in parts)
    return is_name and all(sign in ("=", "in") for sign in relation.signs)


def _is_solved(relation: Relation) -> bool:
    return _has_name(relation) and not free_symbols(relation.sides[-1])


def _right_side(node: Node) -> Node:
    """What `x = 5` or `2 + 3 = 5` come to."""
    if not isinstance(node, Relation) or any(sign not in ("=", "in") for sign in node.signs):
        return node
    if _has_name(node) or not free_symbols(node.sides[0]):
        return node.sides[-1]
    return node


def _as_interval(node: Node) -> Node:
    """`x > 3` and `1 <= x < 2` as the intervals that they are."""
    if not isinstance(node, Relation) or not set(node.signs) <= _FLIPPED.keys():
        return node
    node = _not_descending(node)
    low, high = Apply("neg", (INFINITY,)), INFINITY
    if len(node.signs) == 1:
        left, right = node.sides
        is_closed = node.signs[0] == "<="
        if isinstance(left, Symbol) and not free_symbols(right):
            return Group("(]" if is_closed else "()", (low, right))
        if isinstance(right, Symbol) and not free_symbols(left):
            return Group("[)" if is_closed else "()", (left, high))
    if len(node.signs) == 2 and isinstance(node.sides[1], Symbol):
        first, _, last = node.sides
        if not free_symbols(first) | free_symbols(last):
            opening = "[" if node.signs[0] == "<=" else "("
            return Group(opening + ("]" if node.signs[1] == "<=" else ")"), (first, last))
    return node


def _not_descending(relation: Relation) -> Relation:
    """With < and <= in place of > and >=, where all signs point one way."""
    if all(sign in (">", ">=") for sign in relation.signs):
        signs = tuple(_FLIPPED[sign] for sign in reversed(relation.signs))
        return Relation(signs, tuple(reversed(relation.sides)))
    return relation


def _difference(relation: Relation) -> Node:
    return Apply("add", (relation.sides[0], Apply("neg", (relation.sides[1],))))


def _infinite_sign(node: Node) -> int:
    if node == INFINITY:
        return 1
    if isinstance(node, Apply) and node.name == "neg":
        return -_infinite_sign(node.parts[0])
    return 0


def _same_words(left: Words, right: Words) -> bool:
    return left.text.split() == right.text.split() or (
        left.text.casefold().split() == right.text.casefold().split()
    )


def _is_percent(node: Node) -> bool:
    return any(isinstance(part, Apply) and part.name == "percent" for part in walk(node))


def _without_percent(node: Node) -> Node:
    if isinstance(node, Apply):
        if node.name == "percent":
            return _without_percent(node.parts[0])
        return Apply(node.name, tuple(_without_percent(part) for part in node.parts))
    return node
