"""A cleaned copy of the data, and a list of what was left out and why."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from tunesmith.data.check.checker import Dropped
from tunesmith.data.columns import RowParser
from tunesmith.data.readers import Row, read_rows
from tunesmith.data.readers.workbook import write_workbook
from tunesmith.data.sources import Source
from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import atomic_text

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
    form = check_target(path, sources)
    list_path = path.with_name(f"{path.name}.dropped.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = Counter[bool]()
    with atomic_text(list_path) as lost:

        def kept() -> Iterator[Row]:
            for row, problem in _judged(sources, dropped):
                counts[problem is None] += 1
                if problem is None:
                    yield row
                else:
                    lost.write(_as_line(problem, row))

        _WRITERS[form](path, kept())
    return Fixed(counts[True], counts[False], path, list_path)


def check_target(path: Path, sources: Sequence[Source]) -> Form:
    """The form of the file to write, so that a wrong name is refused before hours of work.

    Raises:
        DataError: another ending, or a file that is read from (`data.fix-target`).
    """
    inputs = {file.resolve() for source in sources for file in source.files}
    suffix = path.suffix.lower()
    found = "a file that the data is read from" if path.resolve() in inputs else f"{suffix!r}"
    for form in (".jsonl", ".csv", ".xlsx"):
        if suffix == form and path.resolve() not in inputs:
            return form
    expected = "a new file that ends in .jsonl, .csv or .xlsx"
    raise DataError([Problem(str(path), "data.fix-target", found, expected)])


def _judged(sources: Sequence[Source], dropped: Dropped) -> Iterator[tuple[Row, Problem | None]]:
    """Every row with the reason to leave it out, if there is one."""
    for source in sources:
        config, parser = source.config, RowParser(source.config)
        rows = (
            row
            for file in source.files
            for row in read_rows(file, encoding=config.encoding, sheet=config.sheet)
        )
        for row in islice(rows, config.limit):
            sample = row.value if isinstance(row.value, Problem) else parser.parse(row)
            if isinstance(sample, Problem):
                yield row, sample
            else:
                yield row, dropped.rows.get(row.origin)


def _as_line(problem: Problem, row: Row) -> str:
    value = None if isinstance(row.value, Problem) else row.value
    return _json({**asdict(problem), "row": value})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with atomic_text(path) as file:
        file.writelines(_json(row.value) for row in rows)


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    with _as_table(rows) as table, atomic_text(path) as file:
        # Excel takes a CSV file for the system's own encoding unless it starts with this mark.
        file.write("\ufeff")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.header)
        writer.writerows(table.rows)


def _write_xlsx(path: Path, rows: Iterable[Row]) -> None:
    with _as_table(rows) as table:
        write_workbook(path, table.header, table.rows, sheet=table.sheet or "Sheet1")


_WRITERS: dict[Form, Callable[[Path, Iterable[Row]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".xlsx": _write_xlsx,
}


@dataclass(frozen=True)
class _Table:
    """A header and rows of cells, with the name of the sheet they came from."""

    header: list[str]
    rows: Iterator[list[str]]
    sheet: str | None


@contextmanager
def _as_table(rows: Iterable[Row]) -> Generator[_Table]:
    """Rows as a table; they wait in a file, for all column names must be known first."""
    header: dict[str, None] = {}
    sheet: str | None = None
    with TemporaryFile("w+", encoding="utf-8", errors="surrogatepass") as spool:
        for row in rows:
            if not isinstance(row.value, Problem):
                header.update(dict.fromkeys(row.value))
                sheet = sheet or row.origin.sheet
                spool.write(_json(row.value))
        spool.seek(0)
        cells = ([_cell(value.get(name)) for name in header] for value in map(json.loads, spool))
        yield _Table(list(header), cells, sheet)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
