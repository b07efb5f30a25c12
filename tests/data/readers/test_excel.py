"""Workbooks: cells as people see them, named by their letters, and written back."""

import datetime
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook

from tunesmith.data.readers import Meter, Row, read_rows, workbook
from tunesmith.data.readers.excel import column_letter
from tunesmith.data.readers.workbook import write_workbook
from tunesmith.errors import DataError, Problem


def book(path: Path, sheets: dict[str, list[list[Any]]], hidden: Sequence[str] = ()) -> Path:
    file = Workbook()
    for name, rows in sheets.items():
        sheet = file.create_sheet(name)
        for line, row in enumerate(rows, start=1):
            for column, value in enumerate(row, start=1):
                sheet.cell(line, column, value)
        sheet.sheet_state = "hidden" if name in hidden else "visible"
    del file["Sheet"]
    file.save(path)
    return path


def refusal(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path, **options))
    return caught.value


def test_cells_are_what_a_person_sees(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    values: list[tuple[Any, str]] = [
        (3, "3"),
        (3.0, "3"),
        (-0.5, "-0.5"),
        (0.1 + 0.2, "0.3"),
        (123456789012345, "123456789012345"),
        (1e20, "1e+20"),
        (True, "TRUE"),
        (datetime.datetime(2024, 1, 2), "2024-01-02"),
        (moment, "2024-01-02T03:04:05"),
        (datetime.time(3, 4), "03:04:00"),
        (" 多行\n文字 ", " 多行\n文字 "),
        (datetime.timedelta(hours=30), "1 day, 6:00:00"),
        (None, ""),
        ("=1+1", ""),  # a formula that nothing has calculated
    ]
    path = book(tmp_path / "b.xlsx", {"S": [["n", "v"], *([1, value] for value, _ in values)]})
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"n": "1", "v": text} for _, text in values]


def test_rows_are_named_by_sheet_and_cell(tmp_path: Path) -> None:
    rows = [[], [], [None, "问题", "回答"], [], [None, "q", "a"], [None, " "], [None, None, "a2"]]
    path = book(tmp_path / "数据.xlsx", {"空": [], "第 1 页": rows})
    first, second = read_rows(path)
    assert str(first.origin) == f"{path}:第 1 页!A5"
    assert first.origin.cell(first.cells["回答"]) == f"{path}:第 1 页!C5"
    assert first == Row(first.origin, {"问题": "q", "回答": "a"}, {"问题": "B", "回答": "C"})
    assert (second.origin.line, second.value) == (7, {"问题": "", "回答": "a2"})


def test_sheets(tmp_path: Path) -> None:
    sheets: dict[str, list[list[Any]]] = {
        "empty": [],
        "notes": [["x"], ["hidden"]],
        "train": [["x"], ["1"]],
        "test": [["x"], ["2"]],
    }
    path = book(tmp_path / "b.xlsx", sheets, hidden=["notes"])
    assert [row.value for row in read_rows(path)] == [{"x": "1"}]
    assert [row.value for row in read_rows(path, sheet="test")] == [{"x": "2"}]
    assert [row.value for row in read_rows(path, sheet="notes")] == [{"x": "hidden"}]
    error = refusal(path, sheet="tset")
    assert (error.code, error.found) == ("data.sheet", "no sheet `tset`")
    assert error.expected == "one of: empty, notes, train, test"
    assert refusal(path, sheet="empty").code == "data.empty-file"


def test_a_macro_workbook_is_a_workbook(tmp_path: Path) -> None:
    path = book(tmp_path / "b.xlsx", {"S": [["x"], ["1"]]}).rename(tmp_path / "b.XLSM")
    meter = Meter()
    assert [row.value for row in read_rows(path, meter=meter)] == [{"x": "1"}]
    assert meter.bytes_read == path.stat().st_size


def test_a_name_twice(tmp_path: Path) -> None:
    path = book(tmp_path / "b.xlsx", {"S": [["q", "a", "q "], [1, 2, 3]]})
    error = refusal(path)
    assert (error.code, error.where) == ("data.header", f"{path}:S!C1")


def test_a_value_under_no_name(tmp_path: Path) -> None:
    path = book(tmp_path / "b.xlsx", {"S": [["q", None, "a"], [1, None, 2], [3, "note", 4]]})
    good, bad = read_rows(path)
    assert good.value == {"q": "1", "a": "2"}
    assert isinstance(bad.value, Problem)
    assert (bad.value.where, bad.value.code) == (f"{path}:S!B3", "data.header")


def test_nothing_in_it(tmp_path: Path) -> None:
    assert refusal(book(tmp_path / "b.xlsx", {"S": []})).code == "data.empty-file"


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut off", b"a,b\n1,2\n", b"\xd0\xcf\x11\xe0"])
def test_what_is_no_workbook(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "b.xlsx"
    path.write_bytes(content)
    error = refusal(path)
    assert error.code == "data.excel"
    assert ("password" in error.found) == (content[0] == 0xD0)


def test_a_workbook_with_another_ending(tmp_path: Path) -> None:
    path = book(tmp_path / "b.xlsx", {"S": [["x"], ["1"]]}).rename(tmp_path / "b.csv")
    error = refusal(path)
    assert (error.code, error.found) == ("data.format", "a zip archive or an Excel workbook")


@pytest.mark.parametrize(
    ("index", "letters"), [(0, "A"), (25, "Z"), (26, "AA"), (701, "ZZ"), (702, "AAA")]
)
def test_letters(index: int, letters: str) -> None:
    assert column_letter(index) == letters


# Writing

AWKWARD = ["=1+1", "#N/A", "a\rb\r\nc", "_x000D_", "\x00\x1f", " lead ", "1e5", "🌍\u2028", "@x"]


def test_awkward_text_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "b.xlsx"
    write_workbook(path, ["q", "答"], ([text, "x"] for text in AWKWARD), sheet="第一")
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"q": text, "答": "x"} for text in AWKWARD]
    assert str(rows[0].origin) == f"{path}:第一!A2"
    cells = [row[0] for row in load_workbook(path).active.iter_rows(min_row=2)]  # type: ignore
    assert [cell.data_type for cell in cells] == ["s"] * len(AWKWARD)
    assert [item.name for item in tmp_path.iterdir()] == ["b.xlsx"]


def test_more_than_a_cell_holds(tmp_path: Path) -> None:
    path = tmp_path / "b.xlsx"
    with pytest.raises(DataError) as caught:
        write_workbook(path, ["q", "a"], [["x" * 32_767, "1"], ["2", "x" * 32_768]])
    assert (caught.value.code, caught.value.where) == ("data.excel-size", f"{path}:Sheet1!B3")
    assert list(tmp_path.iterdir()) == []


def test_more_rows_than_a_sheet_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbook, "MAX_SHEET_ROWS", 3)
    with pytest.raises(DataError) as caught:
        write_workbook(tmp_path / "b.xlsx", ["q"], [["1"], ["2"], ["3"]])
    assert caught.value.code == "data.excel-size"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2),
        max_size=4,
    )
)
def test_any_text_comes_back(rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.xlsx"
        write_workbook(path, ["a", "b"], rows)
        read = [row.value for row in read_rows(path)]
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    assert read == [dict(zip("ab", row, strict=True)) for row in kept]
