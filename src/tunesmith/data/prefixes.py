"""Finds prefixes that sequences share, so that each is computed once.

Every layer but attention works token by token, and attention looks back only: equal tokens after
equal tokens at equal positions give equal hidden states. One copy of a prefix is then the same
computation as many, its gradient the sum of theirs. That holds as long as nothing draws random
numbers per token: with dropout, one copy has one draw where many have many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SHORTEST_PREFIX = 16
"""Tokens of a prefix at least: a shorter one saves less than the segment it makes costs."""

MOST_LEVELS = 32
"""Prefixes within prefixes at most, against data of pathological depth."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Branch:
    """Tokens `[first, stop)` of some sequences, and the branches that go on from there.

    A branch without children ends one sequence; each sequence ends in a branch of its own, which
    has at least one token unless the sequence is empty.

    Args:
        sequence: the number of a sequence that has these tokens; of a leaf, its own.
    """

    sequence: int
    first: int
    stop: int
    children: tuple[Branch, ...] = ()

    @cached_property
    def num_stored(self) -> int:
        """Tokens of this branch and all after it, each prefix counted once."""
        return self.stop - self.first + sum(child.num_stored for child in self.children)

    def leaves(self) -> Iterator[Branch]:
        """The ends of the sequences that go through this branch."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()

    def with_children(self, children: Sequence[Branch]) -> Branch:
        """The same branch with fewer children; an only child is one with it."""
        if len(children) == 1:
            return replace(children[0], first=self.first)
        return replace(self, children=tuple(children))

    def renumbered(self, first: int) -> Branch:
        """The same branch with sequences numbered from `first` on."""
        children = tuple(child.renumbered(first) for child in self.children)
        return replace(self, sequence=self.sequence + first, children=children)


def whole(sequences: Sequence[Ids]) -> list[Branch]:
    """Every sequence by itself."""
    return [Branch(number, 0, len(ids)) for number, ids in enumerate(sequences)]


def shared_prefixes(sequences: Sequence[Ids]) -> list[Branch]:
    """Every sequence once, with what they share at their beginnings as a forest.

    Prefixes may branch again (system prompt, question, answers). The result depends on the
    sequences and their order alone.
    """
    # Big-endian bytes sort as the numbers do, so equal beginnings become neighbors.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    by_prefix = sorted(range(len(sequences)), key=lambda number: (keys[number], number))
    ordered = [sequences[number] for number in by_prefix]
    common = [0] + [_num_common(*pair) for pair in pairwise(ordered)]
    sorted_ones = _Sorted(by_prefix, [len(ids) for ids in ordered], common)
    return _grow(sorted_ones, (0, len(ordered)), start=0, level=0)


@dataclass(frozen=True)
class _Sorted:
    """Sequences in the order of their tokens.

    `common[i]` counts the tokens that sequences `i - 1` and `i` have in common.
    """

    numbers: list[int]
    lengths: list[int]
    common: list[int]


def _num_common(one: Ids, other: Ids) -> int:
    """Equal tokens at the beginning, leaving at least one token to each."""
    most = max(min(len(one), len(other)) - 1, 0)
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def _grow(ordered: _Sorted, bounds: tuple[int, int], *, start: int, level: int) -> list[Branch]:
    """Branches of the sequences within `bounds`, which agree in their first `start` tokens."""
    first, last = bounds
    least = start + SHORTEST_PREFIX
    cuts = [i for i in range(first + 1, last) if level == MOST_LEVELS or ordered.common[i] < least]
    branches: list[Branch] = []
    for begin, end in zip([first, *cuts], [*cuts, last], strict=True):
        if end - begin == 1:
            branches.append(Branch(ordered.numbers[begin], start, ordered.lengths[begin]))
        elif end > begin:
            stop = min(ordered.common[begin + 1 : end])
            children = _grow(ordered, (begin, end), start=stop, level=level + 1)
            branches.append(Branch(ordered.numbers[begin], start, stop, tuple(children)))
    return branches
