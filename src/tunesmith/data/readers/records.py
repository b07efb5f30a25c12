"""Opens a data file and yields its rows, whatever the format."""

from __future__ import annotations

import codecs
import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.readers.json_array import read_json_array
from tunesmith.data.readers.json_lines import read_json_lines
from tunesmith.data.readers.text import read_lines
from tunesmith.errors import DataError, Problem
from tunesmith.types import Json


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, or the problem that stands in its place."""

    line: int
    value: dict[str, Json] | Problem


def read_rows(path: Path, *, encoding: str = "utf-8") -> Iterator[Row]:
    """Yields the rows of a .json or .jsonl file with their line numbers.

    A `.json` file may hold an array or JSON lines, and a `.jsonl` file an array: the first
    character decides, not the name.

    Raises:
        DataError: the file is missing (`data.missing-file`), a folder (`data.not-a-file`), empty
            (`data.empty-file`) or of a format that is not read (`data.format`).
    """
    _check_file(path)
    _check_encoding(path, encoding)
    first = _first_character(path, encoding)
    if isinstance(first, Problem):
        yield Row(1, first)
    elif first == "[":
        for line, value in read_json_array(path, encoding):
            yield Row(line, value)
    elif first == "{":
        for line, value in read_json_lines(path, encoding):
            yield Row(line, value)
    else:
        raise DataError(
            [
                Problem(
                    str(path),
                    "data.format",
                    f"a file that starts with {first!r}",
                    "JSON lines (starting with {) or a JSON array (starting with [)",
                )
            ]
        )


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            [Problem(str(path), "data.not-a-file", "a folder", "a .json or .jsonl file")]
        )
    if not path.exists():
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise DataError(
            [Problem(str(path), "data.missing-file", "no such file", "a data file")],
            try_=f"did you mean {path.parent / near[0]}?" if near else None,
        )
    if not os.access(path, os.R_OK):
        found = "a file that may not be read"
        raise DataError([Problem(str(path), "data.unreadable", found, "read permission")])
    if path.stat().st_size == 0:
        raise DataError([Problem(str(path), "data.empty-file", "0 bytes", "at least one row")])


def _check_encoding(path: Path, encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        found = f"the encoding {encoding!r}"
        expected = "a name that Python knows, e.g. utf-8, utf-16, gb18030"
        raise DataError([Problem(str(path), "data.encoding", found, expected)]) from None


def _first_character(path: Path, encoding: str) -> str | Problem:
    for _, line in read_lines(path, encoding):
        if isinstance(line, Problem):
            return line
        if line.strip():
            return line.lstrip()[0]
    raise DataError(
        [Problem(str(path), "data.empty-file", "nothing but blank lines", "at least one row")]
    )
