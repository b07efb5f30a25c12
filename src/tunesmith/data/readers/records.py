"""Opens a data file and yields its rows, whatever the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.data.readers.csv_table import read_csv
from tunesmith.data.readers.data_file import DataFile, Meter
from tunesmith.data.readers.documents import read_markdown, read_text
from tunesmith.data.readers.encodings import check_encoding, head_of
from tunesmith.data.readers.files import TABLE_ENDINGS, TEXT_ENDINGS, check_file, is_mindrecord
from tunesmith.data.readers.json_array import read_json_array
from tunesmith.data.readers.json_form import json_form
from tunesmith.data.readers.json_lines import read_json_lines
from tunesmith.data.readers.json_objects import read_json_objects
from tunesmith.data.readers.row import Row
from tunesmith.errors import DataError, Problem

Reader = Callable[[DataFile], Iterator[Row]]

JSON_READERS: dict[str, Reader] = {
    "array": read_json_array,
    "lines": read_json_lines,
    "objects": read_json_objects,
}

# Beginnings of files that are no text, whatever their names say.
BEGINNINGS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook, or one with a password",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"%PDF": "a PDF document",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}

JSON_BEGINNING = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')

LFS_POINTER = b"version https://git-lfs.github.com/"


def read_rows(
    path: Path, *, encoding: str = "auto", sheet: str | None = None, meter: Meter | None = None
) -> Iterator[Row]:
    """Yields the rows of one file with their places, and problems in the places of bad rows.

    The name's ending tells tables and documents. JSON is known by its first characters, so that a
    `.json` file may hold lines, a `.jsonl` file an array, and a `.txt` file either. Text formats
    may be packed (.gz, .zst).

    Args:
        path: the file.
        encoding: of text formats; `auto` goes by the byte order mark, and is UTF-8 without one.
        sheet: of a workbook; the first that has rows if None.
        meter: counts the bytes read.

    Raises:
        DataError: the file as a whole cannot be read: it is missing (`data.missing-file`), a folder
            (`data.not-a-file`), empty (`data.empty-file`), of another format (`data.format`), a
            pointer that git left in its place (`data.lfs-pointer`), or damaged.
    """
    check_file(path)
    file = DataFile(path, encoding, sheet, meter or Meter())
    check_encoding(file)
    head = head_of(file)
    if head.startswith(LFS_POINTER):
        found = "a pointer that Git LFS left in place of the file"
        problem = Problem(str(path), "data.lfs-pointer", found, "the file itself")
        raise DataError([problem], try_="git lfs pull, or download the file again")
    yield from _reader(file, head)(file)


def _reader(file: DataFile, head: bytes) -> Reader:
    ending = file.path.suffix.lower()
    if is_mindrecord(file.path):
        return _read_mindrecord
    if ending in (".xlsx", ".xlsm"):
        # Here, because it takes a moment to load that nobody without workbooks should wait for.
        from tunesmith.data.readers.excel import read_excel

        return read_excel
    if ending in (".parquet", ".arrow"):
        from tunesmith.data.readers import arrow

        return arrow.read_parquet if ending == ".parquet" else arrow.read_arrow
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            raise _unknown_format(file, kind)
    if file.ending in (".csv", ".tsv"):
        return read_csv
    if file.ending == ".md":
        return read_markdown
    is_text = file.ending == ".txt" and not JSON_BEGINNING.match(head)
    return read_text if is_text else _read_json


def _read_json(file: DataFile) -> Iterator[Row]:
    form = json_form(file)
    if isinstance(form, Problem):
        return iter([Row(file.origin(1), form)])
    if form is None:
        raise _unknown_format(file, "a file that starts neither with { nor with [")
    return JSON_READERS[form](file)


def _read_mindrecord(file: DataFile) -> Iterator[Row]:
    from tunesmith.data.readers.mindrecord import read_mindrecord

    for number, value in read_mindrecord(file.path):
        yield Row(file.origin(number), value)
    file.meter.bytes_read += file.path.stat().st_size


def _unknown_format(file: DataFile, found: str) -> DataError:
    endings = " ".join((*TEXT_ENDINGS, *TABLE_ENDINGS, ".mindrecord"))
    expected = f"JSON lines, a JSON array, or a file that ends in one of {endings}"
    return DataError([Problem(str(file.path), "data.format", found, expected)])
