"""The header row of a table: column names that a recipe can speak of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.errors import DataError, Problem


def check_names(names: Sequence[str], where: Sequence[str]) -> None:
    """Refuses column names that stand twice; `where` are the places of the names.

    Raises:
        DataError: with the second place of each such name (`data.header`).
    """
    problems: list[Problem] = []
    seen: Counter[str] = Counter()
    for name, place in zip(names, where, strict=True):
        seen[name] += 1
        if name and seen[name] == 2:
            found = f"two columns named `{name}`"
            problems.append(Problem(place, "data.header", found, "a name of its own per column"))
    if problems:
        raise DataError(problems, try_="rename or remove one of the two")
