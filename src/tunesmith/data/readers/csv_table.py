"""CSV and TSV tables, streamed; every cell is text, as it stands."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.header import check_names
from tunesmith.data.readers.row import Row
from tunesmith.data.readers.text import MAX_ROW_CHARS, read_lines
from tunesmith.errors import DataError, Problem

DELIMITERS = ",;\t"

EXPECTED = 'cells split by the delimiter, those with quotes or line ends in quotes, "" for a quote'


def read_csv(file: DataFile) -> Iterator[Row]:
    """Yields the rows under the header, each with the line it starts on.

    A `.csv` file may use commas, semicolons or tabs: what separates the header decides. Rows
    without any text are skipped, as spreadsheets write them below a table.

    Raises:
        DataError: the header has an empty or doubled name (`data.header`), or there is no line at
            all (`data.empty-file`).
    """
    table = _Table(file)
    header = _header(file, table)
    for line, cells in table.rows():
        if isinstance(cells, Problem):
            yield Row(file.origin(line), cells)
        elif len(cells) == len(header):
            if any(cells):
                yield Row(file.origin(line), dict(zip(header, cells, strict=True)))
        elif any(cell.strip() for cell in cells):
            expected = f"{_count(len(header))} as in the header"
            problem = _problem(file, line, _count(len(cells)), expected)
            yield Row(file.origin(line), problem)


def _header(file: DataFile, table: _Table) -> list[str]:
    for line, cells in table.rows():
        if isinstance(cells, Problem):
            raise DataError([cells])
        names = [cell.strip() for cell in cells]
        if not any(names):
            continue
        where = f"{file.path}:{line}"
        if "" in names:
            place = names.index("") + 1
            found = f"no name for column {place} of {len(names)}"
            raise DataError(
                [Problem(where, "data.header", found, "a name for each column")],
                try_="name it or remove it; pandas leaves it out with to_csv(..., index=False)",
            )
        check_names(names, [where] * len(names))
        return names
    found = "nothing but blank lines"
    raise DataError([Problem(str(file.path), "data.empty-file", found, "a header and rows")])


def _problem(file: DataFile, line: int, found: str, expected: str) -> Problem:
    return Problem(f"{file.path}:{line}", "data.csv", found, expected)


def _count(number: int) -> str:
    return f"{number} cell{'s' if number != 1 else ''}"


class _BadLineError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


class _Table:
    """Python's csv reader over lines that may be problems."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.lines = _Lines(file)
        self.reader = csv.reader(self.lines, delimiter=self.lines.delimiter, strict=True)

    def rows(self) -> Iterator[tuple[int, list[str] | Problem]]:
        """Yields (line where the row starts, its cells or the problem), blank lines left out."""
        while True:
            line = self.lines.number + 1
            try:
                cells = self._next()
            except _BadLineError as bad:
                yield line, bad.problem
            except csv.Error as error:
                found, is_lost = _reason(error)
                yield line, _problem(self.file, line, found, EXPECTED)
                if is_lost:
                    return
            else:
                if cells is None:
                    return
                if cells:
                    yield line, cells

    def _next(self) -> list[str] | None:
        # The limit is one for the whole process: it is raised for the moment of reading only.
        limit = csv.field_size_limit(MAX_ROW_CHARS)
        try:
            return next(self.reader, None)
        finally:
            csv.field_size_limit(limit)


def _reason(error: csv.Error) -> tuple[str, bool]:
    """What is wrong, and whether nobody knows where the next row starts."""
    text = str(error)
    if text.startswith("unexpected end of data"):
        return "a quote that is opened here and never closed", True
    if text.startswith("field larger"):
        return f"a cell of more than {MAX_ROW_CHARS:,} characters, or a quote never closed", True
    return ("text behind a closing quote" if "expected after" in text else text), False


class _Lines:
    """The lines for the csv reader: an iterator that goes on after raising, unlike a generator."""

    def __init__(self, file: DataFile) -> None:
        self.lines = read_lines(file)
        self.number = 0
        self.first: tuple[int, str | Problem] | None = next(self.lines, None)
        self.delimiter = self._sniff(file.ending)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, line = self.first or next(self.lines)
        self.first = None
        self.number = number
        if isinstance(line, Problem):
            raise _BadLineError(line)
        return line + "\n"

    def _sniff(self, ending: str) -> str:
        """The delimiter; Excel's line `sep=;` is obeyed and left out."""
        while self.first and isinstance(self.first[1], str) and not self.first[1].strip():
            self.first = next(self.lines, None)
            self.number += 1
        if not self.first or isinstance(self.first[1], Problem):
            return ","
        line = self.first[1]
        if line[:4].lower() == "sep=" and line[4:] in (*DELIMITERS, "|"):
            self.first = next(self.lines, None)
            self.number += 1
            return line[4:]
        if ending == ".tsv":
            return "\t"
        unquoted = "".join(line.split('"')[::2])
        return max(DELIMITERS, key=unquoted.count)
