"""Writes Excel workbooks, so that a table can go back to where it came from."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from openpyxl import Workbook
from openpyxl.cell import Cell, WriteOnlyCell
from openpyxl.worksheet._write_only import WriteOnlyWorksheet

from tunesmith.data.readers.excel import column_letter
from tunesmith.errors import DataError, Problem
from tunesmith.io.atomic import write_atomic
from tunesmith.types import Origin

MAX_CELL_CHARS = 32_767
"""Excel's own limit; openpyxl cuts longer texts without a word."""

MAX_SHEET_ROWS = 1_048_576

# Workbooks write characters that XML cannot hold as _x000D_, and a text that looks so with the
# underscore itself as _x005F_.
ESCAPED = re.compile("_(?=x[0-9A-Fa-f]{4}_)|[\x00-\x08\x0b-\x1f\ufffe\uffff]")


def write_workbook(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], *, sheet: str = "Sheet1"
) -> None:
    """Writes one sheet of text cells; the file appears whole or not at all.

    Text that looks like a formula (`=1+1`) stays text, and control characters are kept.

    Raises:
        DataError: more than a sheet can hold, which is 32,767 characters in a cell and 1,048,576
            rows (`data.excel-size`).
        DiskError: the file cannot be written (`disk.write`).
    """
    workbook = Workbook(write_only=True)
    table: WriteOnlyWorksheet = workbook.create_sheet(sheet)
    try:
        for line, row in enumerate(chain([header], rows), start=1):
            origin = Origin(str(path), line, sheet)
            if line > MAX_SHEET_ROWS:
                raise _too_large(str(origin), f"more than {MAX_SHEET_ROWS:,} rows", "fewer rows")
            table.append([_cell(table, text, origin, index) for index, text in enumerate(row)])
    finally:
        table.close()
    content = io.BytesIO()
    workbook.save(content)
    write_atomic(path, content.getvalue())


def _cell(table: WriteOnlyWorksheet, text: str, origin: Origin, index: int) -> Cell:
    text = ESCAPED.sub(lambda match: f"_x{ord(match.group()):04X}_", text)
    if len(text) > MAX_CELL_CHARS:
        where = origin.cell(column_letter(index))
        expected = f"at most {MAX_CELL_CHARS:,}, which is all that a cell holds"
        raise _too_large(where, f"a text of {len(text):,} characters", expected)
    cell = WriteOnlyCell(table, text)
    cell.data_type = "s"  # else `=1+1` becomes a formula
    return cell


def _too_large(where: str, found: str, expected: str) -> DataError:
    problem = Problem(where, "data.excel-size", found, expected)
    return DataError([problem], try_="write a .jsonl or .csv file instead")
