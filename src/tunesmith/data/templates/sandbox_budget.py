"""What one render of a chat template may spend: processor time, text written, memory held.

Costs are counted as they arise and refused before the memory is taken. They do not depend on the
machine; the clock is the backstop for work that takes long without making anything.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn, cast

from jinja2 import TemplateRuntimeError
from jinja2.utils import Namespace

TICKS_PER_LOOK = 16
"""Steps between two looks at the clock; the longest step takes some 10 ms."""

ITEM_COST = 64
"""Characters that one item of a list counts as: about its share of the list and its own header."""

MAX_PRODUCT = 1 << 28
"""Character comparisons that one call may need at worst, a quarter of a second's work."""

MAX_INTEGER_BITS = 1 << 16

# Tuples made once: `str | bytes` would be built anew for each value.
TEXTS = (str, bytes)
LISTS = (list, tuple, dict, set, frozenset)
CONTAINERS = (*LISTS, Namespace)
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
SEEN_THROUGH = CONTAINERS + VIEWS


class TemplateLimitError(TemplateRuntimeError):
    """A template took more time, wrote more text or held more memory than it may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for a short conversation; they grow with the length of longer ones.

    `seconds` is processor time of the rendering thread, so a busy machine refuses nothing.
    """

    seconds: float = 0.8
    output_characters: int = 4 << 20
    memory_characters: int = 16 << 20

    MAX_MEMORY = 512 << 20
    """Characters made in one render, however long the conversation."""


class Budget:
    """What is left for one render."""

    __slots__ = ("_deadline", "_limits", "_ticks", "memory", "output", "output_limit")

    def __init__(self, limits: Limits, num_messages: int, num_characters: int) -> None:
        self._limits = limits
        self._ticks = TICKS_PER_LOOK
        # An honest template takes some 20 µs a message and 1 ns a character.
        seconds = limits.seconds + num_messages * 0.001 + num_characters * 2.5e-7
        self._deadline = time.thread_time() + seconds
        self.output_limit = max(limits.output_characters, 8 * num_characters)
        self.output = self.output_limit
        # Adding one message after the other to a text copies the whole of it each time.
        copied = min(num_messages * num_characters, Limits.MAX_MEMORY)
        self.memory = max(limits.memory_characters, 4 * self.output_limit, copied)

    def tick(self) -> None:
        """Counts one step and looks at the clock now and then."""
        self._ticks -= 1
        if not self._ticks:
            self.look_at_clock()

    def look_at_clock(self) -> None:
        """Refuses to go on after the deadline."""
        self._ticks = TICKS_PER_LOOK
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(
                f"the template ran for more than {self._limits.seconds:g} s of processor time"
            )

    def spend_output(self, characters: int) -> None:
        """Counts text that goes straight into the rendered conversation."""
        self._ticks -= 1
        if not self._ticks:
            self.look_at_clock()
        self.output -= characters
        if self.output < 0:
            self.refuse_length()

    def spend_memory(self, characters: int) -> None:
        """Counts text or lists that the template makes on its way."""
        self.tick()
        self.memory -= characters
        if self.memory < 0:
            raise TemplateLimitError("the template made more intermediate text than it may")

    def require(self, characters: float) -> None:
        """Counts a text that is about to be made, and refuses one too long for any output."""
        if characters > self.output_limit:
            self.refuse_length()
        self.spend_memory(int(characters))

    def require_product(self, first: int, second: int) -> None:
        """Refuses a search that may compare every character of one text with the other's."""
        self.tick()
        if first * second > MAX_PRODUCT:
            raise TemplateLimitError("the template searches a text with too long a pattern")

    def refuse_length(self) -> NoReturn:
        """Says that a text grew too long."""
        raise TemplateLimitError(
            f"the template wrote a text of more than {self.output_limit} characters"
        )

    def show(self, value: Any) -> Any:
        """Passes on a value that is to be written, at the cost of its text."""
        # As in `tick` and `spend_output`: this is called for every piece of every conversation.
        self._ticks -= 1
        if not self._ticks:
            self.look_at_clock()
        self.output -= len(value) if type(value) is str else self.measure(value)
        if self.output < 0:
            self.refuse_length()
        return value

    def hold(self, value: Any) -> Any:
        """Passes on a value that is to be written into a macro's or a block's own text."""
        self.spend_memory(len(value) if type(value) is str else self.measure(value))
        return value

    def made(self, value: Any) -> Any:
        """Passes on what a call or a filter made, at the cost of what it holds."""
        if isinstance(value, TEXTS):
            size = len(value)
            self.memory -= size
            if size > self.output_limit or self.memory < 0:
                self.require(size)
        elif isinstance(value, LISTS):
            self.require(8 * len(cast("list[Any]", value)))
        return value

    def built(self, value: Any) -> Any:
        """Passes on a container just built of other values, if its whole tree is small enough.

        A list of twice the same list, and so on forty times, is small in memory but endless to
        compare or to write.
        """
        self.spend_memory(self.measure(value))
        return value

    def compared(self, value: Any) -> Any:
        """Passes on one side of a comparison, at the cost of looking through it."""
        self.tick()
        if isinstance(value, CONTAINERS):
            self.measure(value)
        return value

    def add(self, *parts: Any) -> Any:
        """What `a + b + c` gives."""
        size = 0
        for part in parts:
            if type(part) is not str:
                return reduce(self._add_two, parts)
            size += len(part)
        self.memory -= size
        if size > self.output_limit or self.memory < 0:
            self.require(size)
        return "".join(parts)

    def _add_two(self, left: Any, right: Any) -> Any:
        if isinstance(left, str | bytes) and isinstance(right, str | bytes):
            self.require(len(left) + len(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.require(8 * (len(cast("list[Any]", left)) + len(cast("list[Any]", right))))
        add: Any = operator.add
        return add(left, right)

    def join(self, function: Any, parts: tuple[Any, ...]) -> str:
        """What `a ~ b ~ c` gives; the function is one of Jinja's own for it."""
        self.require(sum(len(part) if type(part) is str else self.measure(part) for part in parts))
        return function(parts)

    def multiply(self, left: Any, right: Any) -> Any:
        """What `left * right` gives."""
        if isinstance(left, int) and isinstance(right, int):
            self._require_bits(left.bit_length() + right.bit_length())
        else:
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    self.require(max(times, 0) * self.measure(text))
        return operator.mul(left, right)

    def power(self, left: Any, right: Any) -> Any:
        """What `left ** right` gives."""
        if isinstance(left, int) and isinstance(right, int):
            self._require_bits(left.bit_length() * abs(right))
        return operator.pow(left, right)

    def _require_bits(self, bits: int) -> None:
        self.tick()
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimitError("the template computes with an enormous number")

    def collect(self, values: Iterable[Any]) -> list[Any]:
        """A list of all the values, of which there may be too many."""
        collected: list[Any] = []
        for value in values:
            self.require(ITEM_COST)
            collected.append(value)
        return collected

    def measure(self, value: Any) -> int:
        """About how many characters the value's text has; too many are refused at once."""
        total = 0
        waiting: list[Any] = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, TEXTS):
                total += len(item)
            elif isinstance(item, int):
                total += 8 + item.bit_length() // 3
            elif isinstance(item, SEEN_THROUGH):
                children = _children(item)
                total += 4 + 16 * len(children)
                waiting += children
            else:
                total += 16
            if total > self.output_limit:
                self.refuse_length()
        if total > 10_000:
            self._ticks = max(1, self._ticks - total // 10_000)
        return total


def _children(item: Any) -> list[Any]:
    if isinstance(item, Namespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    if isinstance(item, Mapping):
        pairs = cast("Mapping[Any, Any]", item)
        return [*pairs.keys(), *pairs.values()]
    return list(item)
