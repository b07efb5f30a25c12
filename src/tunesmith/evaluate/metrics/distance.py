"""Edit distance and longest common subsequence, by bits of whole numbers.

Both keep a column of the dynamic programming table in the bits of one integer (Myers,
doi:10.1145/316542.316550; Hyyrö 2003), so that a text of 2,000 characters takes 2,000 steps instead
of 4 million.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's: insertions, deletions and substitutions, each at 1."""
    if not first or not second:
        return max(len(first), len(second))
    places, full = _places(first), (1 << len(first)) - 1
    last, distance = 1 << (len(first) - 1), len(first)
    # Bits say where the column rises by one from cell to cell, and where it falls.
    rises, falls = full, 0
    for item in second:
        equal = places.get(item, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        across_rises = falls | (~(diagonal | rises) & full)
        across_falls = rises & diagonal
        distance += bool(across_rises & last) - bool(across_falls & last)
        across_rises = ((across_rises << 1) | 1) & full
        across_falls = (across_falls << 1) & full
        rises = across_falls | (~(diagonal | across_rises) & full)
        falls = across_rises & diagonal
    return distance


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    places, full = _places(first), (1 << len(first)) - 1
    free = full
    for item in second:
        matched = free & places.get(item, 0)
        free = ((free + matched) | (free - matched)) & full
    return (~free & full).bit_count()


def _places(items: Sequence[Hashable]) -> dict[Hashable, int]:
    """Of each item the bits of where it stands."""
    places: dict[Hashable, int] = {}
    for number, item in enumerate(items):
        places[item] = places.get(item, 0) | (1 << number)
    return places
