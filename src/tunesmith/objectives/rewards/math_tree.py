"""What a mathematical answer is made of, and its value at a point.

Numbers stay exact fractions as long as all that goes into them is exact and of bounded size; the
rest is complex floats. The time is bounded by the length of the answer: nothing is simplified.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

MAX_BITS = 20_000
"""Of an exact number: 6,000 decimal digits, more than any answer; larger ones become floats."""
MAX_FACTORIAL = 1_000


class NotMathError(ValueError):
    """The text is no mathematical expression, or none with a value."""


@dataclass(frozen=True)
class Number:
    """A written number; `is_decimal` if it may have been rounded."""

    value: Fraction
    is_decimal: bool = False


@dataclass(frozen=True)
class Symbol:
    """A letter, with its index if it has one, such as `x` or `a_1`."""

    name: str


@dataclass(frozen=True)
class Words:
    """Text, such as the name of a quantity or a unit."""

    text: str


@dataclass(frozen=True)
class Apply:
    """An operation or function of other parts, such as `add`, `pow` or `sin`."""

    name: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Group:
    """Several values: `list`, `set`, `union`, `matrix`, `row`, or one named by its brackets."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Relation:
    """`sides[0] signs[0] sides[1] ...`; the signs are among = < <= > >= != in."""

    signs: tuple[str, ...]
    sides: tuple[Node, ...]


Node: TypeAlias = Number | Symbol | Words | Apply | Group | Relation
Value: TypeAlias = Fraction | complex

CONSTANTS: dict[str, complex] = {"pi": math.pi + 0j, "e": math.e + 0j, "i": 1j}
INFINITY = Symbol("infinity")


def children(node: Node) -> tuple[Node, ...]:
    """The parts that a node is made of."""
    if isinstance(node, Apply):
        return node.parts
    if isinstance(node, Group):
        return node.items
    return node.sides if isinstance(node, Relation) else ()


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    for child in children(node):
        yield from walk(child)


def free_symbols(node: Node) -> frozenset[str]:
    """Names of the variables in it."""
    names = {part.name for part in walk(node) if isinstance(part, Symbol)}
    return frozenset(names - CONSTANTS.keys() - {INFINITY.name})


def evaluate(node: Node, point: Mapping[str, float]) -> Value:
    """The value where each variable is as in `point`.

    Raises:
        NotMathError: where there is none (division by zero, overflow, infinity, groups, words).
    """
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        if node.name in CONSTANTS:
            return CONSTANTS[node.name]
        if node.name in point:
            return complex(point[node.name])
    if not isinstance(node, Apply) or node.name not in OPERATIONS:
        raise NotMathError("no number")
    values = [evaluate(part, point) for part in node.parts]
    try:
        value = OPERATIONS[node.name](*values)
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            value = complex(value) if bits > MAX_BITS else value
        elif not cmath.isfinite(value):
            raise NotMathError("no finite number")
    except (ArithmeticError, ValueError, TypeError) as error:
        raise NotMathError(str(error)) from None
    return value


def _add(left: Value, right: Value) -> Value:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left + right
    return complex(left) + complex(right)


def _mul(left: Value, right: Value) -> Value:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left * right
    return complex(left) * complex(right)


def _div(left: Value, right: Value) -> Value:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left / right
    return complex(left) / complex(right)


def _pow(base: Value, power: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(power, Fraction) and power.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(power.numerator) <= MAX_BITS:
            return base**power.numerator
    return complex(base) ** complex(power)


def _root(value: Value, degree: Value) -> Value:
    """The real root of a negative number where the degree is odd, else the principal one."""
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2
    number, order = complex(value), complex(degree)
    if odd and number.imag == 0 and number.real < 0:
        return -((-number) ** (1 / order))
    return cmath.sqrt(number) if order == 2 else number ** (1 / order)


def _whole(value: Value) -> int:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL:
        return value.numerator
    raise NotMathError("no small whole number")


def _real(value: Value) -> float | Fraction:
    if isinstance(value, complex):
        if abs(value.imag) > 1e-9:
            raise NotMathError("not real")
        return value.real
    return value


def _log(value: Value, base: Value) -> Value:
    return cmath.log(complex(value)) / cmath.log(complex(base))


def _of_complex(function: Callable[[complex], complex]) -> Callable[[Value], Value]:
    return lambda value: function(complex(value))


def _reciprocal(function: Callable[[complex], complex]) -> Callable[[Value], Value]:
    return lambda value: 1 / function(complex(value))


OPERATIONS: dict[str, Callable[..., Value]] = {
    "add": _add,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "root": _root,
    "neg": lambda value: -value,
    "percent": lambda value: _div(value, Fraction(100)),
    "factorial": lambda value: Fraction(math.factorial(_whole(value))),
    "binom": lambda top, low: Fraction(math.comb(_whole(top), _whole(low))),
    "abs": lambda value: abs(value) if isinstance(value, Fraction) else complex(abs(value)),
    "floor": lambda value: Fraction(math.floor(_real(value))),
    "ceil": lambda value: Fraction(math.ceil(_real(value))),
    "log": _log,
    **{name: _of_complex(getattr(cmath, name)) for name in ("sin", "cos", "tan", "exp")},
    **{name: _of_complex(getattr(cmath, name)) for name in ("sinh", "cosh", "tanh")},
    "arcsin": _of_complex(cmath.asin),
    "arccos": _of_complex(cmath.acos),
    "arctan": _of_complex(cmath.atan),
    "sec": _reciprocal(cmath.cos),
    "csc": _reciprocal(cmath.sin),
    "cot": _reciprocal(cmath.tan),
}
"""What an `Apply` computes."""
