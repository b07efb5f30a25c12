"""A cleaned copy of the data, and a list of what was left out and why."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.check.checker import Dropped
from tunesmith.data.columns import RowParser
from tunesmith.data.readers import Row, read_rows
from tunesmith.data.readers.workbook import write_workbook
from tunesmith.data.sources import Source
from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import atomic_text
from tunesmith.types import Json

Form = Literal[".jsonl", ".csv", ".xlsx"]


@dataclass(frozen=True)
class Fixed:
    """What was written."""

    kept: int
    dropped: int
    path: Path
    list_path: Path


def write_fixed(sources: Sequence[Source], dropped: Dropped, path: Path) -> Fixed:
    """Writes every usable row once, as it is but in UTF-8; duplicates and bad rows go to a list.

    Args:
        sources: what was checked.
        dropped: rows to leave out besides those that cannot be read.
        path: ends in .jsonl, .csv or .xlsx; the list stands beside it as `NAME.dropped.jsonl`.

    Raises:
        DataError: another ending, or a copy that would replace a file it is made from
            (`data.fix-target`).
    """
    form = _form(path, sources)
    list_path = path.with_name(f"{path.name}.dropped.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = Counter[bool]()
    with atomic_text(list_path) as lost:

        def kept() -> Iterator[dict[str, Json]]:
            for row, problem in _judged(sources, dropped):
                counts[problem is None] += 1
                value = row.value if isinstance(row.value, dict) else None
                if problem is not None:
                    lost.write(_as_line(problem, value))
                elif value is not None:
                    yield value

        _write(path, form, kept())
    return Fixed(counts[True], counts[False], path, list_path)


def _judged(sources: Sequence[Source], dropped: Dropped) -> Iterator[tuple[Row, Problem | None]]:
    """Every row with the reason to leave it out, if there is one."""
    for source in sources:
        parser = RowParser(source.config)
        for file in source.files:
            for row in read_rows(file, encoding=source.config.encoding, sheet=source.config.sheet):
                if isinstance(row.value, Problem):
                    yield row, row.value
                    continue
                sample = parser.parse(row)
                if isinstance(sample, Problem):
                    yield row, sample
                else:
                    yield row, dropped.rows.get(row.origin)


def _form(path: Path, sources: Sequence[Source]) -> Form:
    inputs = {file.resolve() for source in sources for file in source.files}
    suffix = path.suffix.lower()
    for form in (".jsonl", ".csv", ".xlsx"):
        if suffix == form and path.resolve() not in inputs:
            return form
    found = "a file that the data is read from" if path.resolve() in inputs else f"{suffix!r}"
    raise DataError(
        [Problem(str(path), "data.fix-target", found, "a new file, .jsonl, .csv or .xlsx")]
    )


def _as_line(problem: Problem, row: dict[str, Json] | None) -> str:
    entry = {
        "where": problem.where,
        "code": problem.code,
        "found": problem.found,
        "expected": problem.expected,
        "row": row,
    }
    return json.dumps(entry, ensure_ascii=False, default=str) + "\n"


def _write(path: Path, form: Form, rows: Iterable[dict[str, Json]]) -> None:
    if form == ".jsonl":
        with atomic_text(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return
    # A table's header must be known before its first row.
    every = list(rows)
    header = list(dict.fromkeys(name for row in every for name in row))
    table = [[_cell(row.get(name)) for name in header] for row in every]
    if form == ".xlsx":
        write_workbook(path, header, table)
        return
    with atomic_text(path) as file:
        # Excel takes a CSV file for the system's own encoding unless it starts with this mark.
        file.write("\ufeff")
        csv.writer(file).writerows([header, *table])


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
