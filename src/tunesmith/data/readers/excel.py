"""Excel workbooks: one sheet as a table, every cell as the text a person sees."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence

from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook, SheetVisibleEnum

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.encodings import head_of
from tunesmith.data.readers.header import check_names
from tunesmith.data.readers.row import Row
from tunesmith.errors import DataError, Problem
from tunesmith.types import Json, Origin

OLD_MAGIC = b"\xd0\xcf\x11\xe0"

EXACT_INTEGERS = 1e15
"""Excel holds 15 digits; it shows larger numbers with an exponent."""


def read_excel(file: DataFile) -> Iterator[Row]:
    """Yields the rows under the header of the sheet asked for, else the first that has any.

    Rows without any text are skipped. Numbers are text without a needless `.0`, dates are ISO
    text. Not covered: merged cells, of which only the first has the value, and formulas in
    workbooks that no spreadsheet program has calculated, which are empty.

    Raises:
        DataError: no workbook (`data.excel`), no such sheet (`data.sheet`), a column name twice
            (`data.header`), or nothing in it (`data.empty-file`).
    """
    try:
        with CalamineWorkbook.from_path(str(file.path)) as workbook:
            sheet = _sheet(file, workbook)
            yield from _rows(file, sheet)
    except CalamineError as error:
        is_old = head_of(file).startswith(OLD_MAGIC)
        reason = "an old .xls, or one with a password" if is_old else str(error)
        found, expected = f"no .xlsx workbook ({reason})", "a whole .xlsx without a password"
        raise DataError([Problem(str(file.path), "data.excel", found, expected)]) from error
    file.meter.bytes_read += file.path.stat().st_size


def column_letter(index: int) -> str:
    """The spreadsheet's name of a column that counts from 0: A to Z, AA, AB and on."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def _sheet(file: DataFile, workbook: CalamineWorkbook) -> CalamineSheet:
    names = workbook.sheet_names
    if file.sheet is not None:
        if file.sheet in names:
            return workbook.get_sheet_by_name(file.sheet)
        found, expected = f"no sheet `{file.sheet}`", f"one of: {', '.join(names)}"
        raise DataError([Problem(str(file.path), "data.sheet", found, expected)])
    hidden = [s.name for s in workbook.sheets_metadata if s.visible != SheetVisibleEnum.Visible]
    for name in [*(name for name in names if name not in hidden), *hidden]:
        sheet = workbook.get_sheet_by_name(name)
        if sheet.height:
            return sheet
    found = "a workbook without anything in it"
    raise DataError([Problem(str(file.path), "data.empty-file", found, "a header and rows")])


def _rows(file: DataFile, sheet: CalamineSheet) -> Iterator[Row]:
    first_column = sheet.start[1] if sheet.start else 0
    letters = [column_letter(first_column + index) for index in range(sheet.width)]
    header: list[str] | None = None
    columns: dict[str, str] = {}
    for line, values in enumerate(sheet.iter_rows(), start=1):
        cells = [cell_text(value) for value in values]
        if not any(cell.strip() for cell in cells):
            continue
        origin = Origin(str(file.path), line, sheet.name)
        if header is None:
            header = [cell.strip() for cell in cells]
            check_names(header, [origin.cell(letter) for letter in letters])
            columns = {name: letter for name, letter in zip(header, letters, strict=True) if name}
        else:
            yield Row(origin, _value(cells, header, letters, origin), columns)
    if header is None:
        where = f"{file.path}:{sheet.name}"
        found = "a sheet without anything in it"
        raise DataError([Problem(where, "data.empty-file", found, "a header and rows")])


def _value(
    cells: Sequence[str], header: Sequence[str], letters: Sequence[str], origin: Origin
) -> dict[str, Json] | Problem:
    for cell, name, letter in zip(cells, header, letters, strict=True):
        if cell.strip() and not name:
            expected = "a name in the header above it, or an empty cell"
            return Problem(origin.cell(letter), "data.header", f"{cell[:40]!r}", expected)
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def cell_text(value: object) -> str:
    """A cell as text: `3` for 3.0, `2024-01-02` for a date, empty for an empty one."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        is_integer = value.is_integer() and abs(value) < EXACT_INTEGERS
        return str(int(value)) if is_integer else f"{value:.15g}"
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
