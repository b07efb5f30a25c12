"""CSV and TSV: which cells belong to which row, and on which line it starts."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.readers import Row, csv_table, read_rows
from tunesmith.errors import DataError, Problem


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, encoding: str = "auto") -> list[tuple[int, object]]:
    return [(row.origin.line, row.value) for row in read_rows(path, encoding=encoding)]


def problem(row: Row) -> Problem:
    assert isinstance(row.value, Problem)
    return row.value


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends(tmp_path: Path, delimiter: str, newline: str) -> None:
    lines = ['问题,回答,"a,b"', '"多,行\n的"",""",x,', "", "2,y,z", ""]
    content = newline.join(lines).replace(",", "\0").replace("\0", delimiter)
    rows = table(written(tmp_path / "d.csv", content))
    cell, name = f"多{delimiter}行\n的" + f'"{delimiter}"', f"a{delimiter}b"
    assert rows == [
        (2, {"问题": cell, "回答": "x", name: ""}),
        (5, {"问题": "2", "回答": "y", name: "z"}),
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "gb18030", "utf-16-be"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "d.csv", "问题,回答\n天气,很好\n".encode(encoding))
    auto = encoding in ("utf-8-sig", "utf-16", "utf-32")
    assert table(path, "auto" if auto else encoding) == [(2, {"问题": "天气", "回答": "很好"})]


def test_excel_s_unicode_text(tmp_path: Path) -> None:
    content = "\ufeffq\ta\r\n1\t2\r\n".encode("utf-16-le")
    assert table(written(tmp_path / "d.csv", content)) == [(2, {"q": "1", "a": "2"})]


def test_excel_s_line_that_names_the_delimiter(tmp_path: Path) -> None:
    content = "\n\nsep=|\nq|a,b\n1|2\n"
    assert table(written(tmp_path / "d.csv", content)) == [(5, {"q": "1", "a,b": "2"})]


def test_one_column_has_no_delimiter(tmp_path: Path) -> None:
    content = 'text\n"<s>Human: 你好，世界\n</s><s>Assistant: hi, there\n</s>"\n'
    ((line, value),) = table(written(tmp_path / "d.csv", content))
    assert (line, value) == (
        2,
        {"text": "<s>Human: 你好，世界\n</s><s>Assistant: hi, there\n</s>"},
    )


def test_a_tab_decides_in_tsv(tmp_path: Path) -> None:
    assert table(written(tmp_path / "d.tsv", "a,b,c\td\n1\t2\n")) == [(2, {"a,b,c": "1", "d": "2"})]


def test_rows_with_more_or_fewer_cells(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", 'a,b\n1,2\n"x\ny"\n1,2,3\n,,,\n   \n5,6\n')
    rows = list(read_rows(path))
    bad = [problem(row) for row in rows if isinstance(row.value, Problem)]
    assert [str(row) for row in bad] == [
        f"{path}:3: data.csv: found 1 cell; expected 2 cells as in the header",
        f"{path}:5: data.csv: found 3 cells; expected 2 cells as in the header",
    ]
    assert [row.origin.line for row in rows] == [2, 3, 5, 8]


def test_text_behind_a_closing_quote(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", 'a,b\n1,2\n"he said "no" to me",2\n3,4\n')
    first, bad, last = read_rows(path)
    assert problem(bad).where == f"{path}:3"
    assert "closing quote" in problem(bad).found
    assert (first.value, last.value) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})


@pytest.mark.parametrize("limit", [1 << 20, 50])
def test_a_quote_that_is_never_closed(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_table, "MAX_ROW_CHARS", limit)
    path = written(tmp_path / "d.csv", 'a,b\n1,2\n3,"4\n' + "5,6\n" * 100)
    good, bad = read_rows(path)
    assert good.origin.line == 2
    assert (problem(bad).where, problem(bad).code) == (f"{path}:3", "data.csv")
    assert "never closed" in problem(bad).found


def test_long_cells_leave_the_process_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = written(tmp_path / "d.csv", "a,b\n1," + "x" * (limit + 10) + "\n1,2\n")
    rows = read_rows(path)
    assert len(str(next(rows).value)) > limit
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (",a,b\n0,1,2\n", "no name for column 1 of 3"),
        ("a,b,\n0,1,2\n", "no name for column 3 of 3"),
        ("a,b,a\n0,1,2\n", "two columns named `a`"),
    ],
)
def test_headers_that_nobody_can_speak_of(tmp_path: Path, content: str, found: str) -> None:
    path = written(tmp_path / "d.csv", content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert (caught.value.code, caught.value.found) == ("data.header", found)
    assert caught.value.where == f"{path}:1"


def test_empty_cells_above_the_header(tmp_path: Path) -> None:
    assert table(written(tmp_path / "d.csv", ",\na,b\n1,2\n")) == [(3, {"a": "1", "b": "2"})]


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert table(written(tmp_path / "d.csv", "a,b\n")) == []


def test_blank_lines_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        table(written(tmp_path / "d.csv", "\n  \n"))
    assert caught.value.code == "data.empty-file"


def test_a_bad_byte_costs_its_row_only(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", b"a,b\n1,2\ncaf\xe9,x\n3,4\n")
    rows = list(read_rows(path))
    assert [row.origin.line for row in rows] == [2, 3, 4]
    bad = problem(rows[1])
    assert (bad.code, bad.where) == ("data.encoding", f"{path}:3")
    assert "byte 0xe9 at column 4, offset 11" in bad.found


def test_gbk_from_chinese_excel(tmp_path: Path) -> None:
    content = "问题,回答\n今天天气怎么样？,很好\n"
    with pytest.raises(DataError) as caught:
        table(written(tmp_path / "d.csv", content.encode("gbk")))
    assert (caught.value.code, caught.value.where) == ("data.encoding", f"{tmp_path / 'd.csv'}:1")
    assert "encoding: gb18030" in caught.value.expected


CELLS = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8
)
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=5)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TABLES, st.sampled_from([".csv", ".tsv"]))
def test_round_trip(rows: list[list[str]], ending: str) -> None:
    header = [f"列{index}" for index in range(len(rows[0]) if rows else 1)]
    content = io.StringIO()
    writer = csv.writer(content, delimiter="\t" if ending == ".tsv" else ",")
    writer.writerows([header, *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / f"d{ending}", content.getvalue())
        read = [value for _, value in table(path)]
    assert read == [dict(zip(header, row, strict=True)) for row in rows if any(row)]
