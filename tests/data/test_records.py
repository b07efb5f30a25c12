"""Rows of JSON lines and JSON arrays: what is read, and where what is wrong stands."""

import json
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.readers import Meter, Row, json_form, json_scan, read_rows, text
from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.json_array import read_json_array
from tunesmith.errors import DataError, Problem, UserError
from tunesmith.types import Origin

ROWS: list[dict[str, Any]] = [{"n": n, "text": f"第{n}行"} for n in range(1, 10)]

# (name, text of a file with these rows); arrays with rows on lines 2 and on, one a line.
FORMATS: dict[str, Callable[[list[str]], str]] = {
    "lines": lambda rows: "\n".join(rows) + "\n",
    "array": lambda rows: "[" + ",\n".join(rows) + "\n]\n",
}


def read(path: Path, encoding: str = "auto") -> list[Row]:
    return list(read_rows(path, encoding=encoding))


def at(path: Path, line: int, value: dict[str, Any]) -> Row:
    return Row(Origin(str(path), line), value)


def values(rows: list[Row]) -> list[Any]:
    return [row.value for row in rows]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def dumped(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path)
    return caught.value


@pytest.fixture(params=[5, 7, 64, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("form", FORMATS)
def test_rows_with_their_lines(tmp_path: Path, form: str) -> None:
    rows = read(written(tmp_path / "d.json", FORMATS[form](dumped(ROWS))))
    assert rows == [at(tmp_path / "d.json", *pair) for pair in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_the_first_character_decides(tmp_path: Path, form: str, suffix: str) -> None:
    path = written(tmp_path / f"d{suffix}", "\n  \n" + FORMATS[form](dumped(ROWS)))
    rows = read(path)
    assert values(rows) == ROWS
    assert rows[0].origin.line == 3


def test_rows_over_several_lines_count_from_their_start(tmp_path: Path, chunk_bytes: int) -> None:
    path = written(tmp_path / "d.json", json.dumps(ROWS, ensure_ascii=False, indent=2))
    rows = read(path)
    assert values(rows) == ROWS
    assert [row.origin.line for row in rows] == [2 + 4 * index for index in range(9)], chunk_bytes


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "broken", ['{"n": 7, "text": }', '{"n": 7 "text": 1}', "{n: 7}", "{'n': 7}", '{"n": 07}']
)
def test_broken_json_names_line_7(tmp_path: Path, form: str, broken: str) -> None:
    lines = dumped(ROWS)
    lines[6] = broken
    path = written(tmp_path / "d.json", FORMATS[form](lines))
    rows = read(path)
    bad = [row for row in rows if isinstance(row.value, Problem)]
    assert [row.origin.line for row in bad] == [7]
    problem = bad[0].value
    assert isinstance(problem, Problem)
    assert (problem.where, problem.code) == (f"{path}:7", "data.json")
    assert "broken JSON" in problem.found
    # Lines go on behind a broken one; an array cannot be understood from there on.
    assert len(rows) == (9 if form == "lines" else 7)
    assert values(rows)[:6] == ROWS[:6]


def test_broken_json_inside_a_long_object_names_its_own_line(
    tmp_path: Path, chunk_bytes: int
) -> None:
    # The second object starts on line 5; the missing value stands on line 7.
    content = '[\n {\n  "a": 1\n },\n {\n  "b": [1,\n   2, ],\n  "c": 3\n }\n]\n'
    path = written(tmp_path / "d.json", content)
    good, bad = read(path)
    assert good == at(path, 2, {"a": 1})
    assert isinstance(bad.value, Problem)
    assert bad.value.where == f"{path}:7", chunk_bytes
    assert bad.origin.line == 7


@pytest.mark.parametrize("form", FORMATS)
def test_every_bad_line_is_reported(tmp_path: Path, form: str) -> None:
    lines = dumped(ROWS)
    for index, bad in ((1, "3"), (3, '"text"'), (4, "null"), (6, "true"), (8, "[1]")):
        lines[index] = bad
    rows = read(written(tmp_path / "d.json", FORMATS[form](lines)))
    found = {row.origin.line: row.value.found for row in rows if isinstance(row.value, Problem)}
    codes = {row.value.code for row in rows if isinstance(row.value, Problem)}
    assert found == {2: "a number", 4: "a string", 5: "null", 7: "true or false", 9: "an array"}
    assert codes == {"data.row"}
    assert len(rows) == 9


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_line_ends(
    tmp_path: Path, form: str, newline: str, mark: bytes, chunk_bytes: int
) -> None:
    content = FORMATS[form](dumped(ROWS)).replace("\n", newline)
    rows = read(written(tmp_path / "d.jsonl", mark + content.encode()))
    assert [(row.origin.line, row.value) for row in rows] == list(enumerate(ROWS, start=1)), (
        chunk_bytes
    )


@pytest.mark.parametrize("form", FORMATS)
def test_blank_lines_are_counted_and_skipped(tmp_path: Path, form: str) -> None:
    content = FORMATS[form](dumped(ROWS[:3])).replace("\n", "\n\n   \n", 1)
    rows = read(written(tmp_path / "d.jsonl", content))
    assert [(row.origin.line, row.value) for row in rows] == [
        (1, ROWS[0]),
        (4, ROWS[1]),
        (5, ROWS[2]),
    ]


def test_no_newline_at_the_end(tmp_path: Path) -> None:
    assert values(read(written(tmp_path / "d.jsonl", '{"a": 1}\n{"a": 2}'))) == [{"a": 1}, {"a": 2}]


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read(written(tmp_path / "d.json", " [ \n ] \n")) == []


# Files that cannot be read at all


def test_an_empty_file(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "d.json", b""))
    assert (error.code, error.found) == ("data.empty-file", "0 bytes")


@pytest.mark.parametrize("content", [b"\n\n  \r\n\t\n", b"\xef\xbb\xbf\n", b" "])
def test_nothing_but_blank_lines(tmp_path: Path, content: bytes) -> None:
    error = refusal(written(tmp_path / "d.json", content))
    assert (error.code, error.found) == ("data.empty-file", "nothing but blank lines")


def test_a_folder(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert (error.code, error.where) == ("data.not-a-file", str(tmp_path))


def test_a_missing_file_with_a_near_name(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", "{}")
    error = refusal(tmp_path / "trian.jsonl")
    assert error.code == "data.missing-file"
    assert error.try_ == f"did you mean {tmp_path / 'train.jsonl'}?"


@pytest.mark.parametrize("place", ["quite-other.csv", "no/such/folder/train.jsonl"])
def test_a_missing_file_with_nothing_near(tmp_path: Path, place: str) -> None:
    written(tmp_path / "train.jsonl", "{}")
    error = refusal(tmp_path / place)
    assert error.code == "data.missing-file"
    assert error.try_ is None


def test_another_format(tmp_path: Path) -> None:
    error = refusal(written(tmp_path / "d.docx", "instruction,output\na,b\n"))
    assert error.code == "data.format"
    assert ".xlsx" in error.expected


# Encodings


@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_bad_byte_has_its_column(tmp_path: Path, form: str) -> None:
    lines = dumped([{"n": 1}, {"text": "今天天气很好"}])
    rows = read(written(tmp_path / "d.json", FORMATS[form](lines).encode("gbk")))
    assert isinstance(rows[-1].value, Problem)
    assert "at column 11," in rows[-1].value.found


@pytest.mark.parametrize("form", FORMATS)
def test_gbk_is_recognized(tmp_path: Path, form: str) -> None:
    lines = dumped([{"n": 1}, {"text": "今天天气很好，我们去公园散步。"}])
    path = written(tmp_path / "d.json", FORMATS[form](lines).encode("gbk"))
    row = read(path)[-1]
    assert row.origin.line == 2
    problem = row.value
    assert isinstance(problem, Problem)
    assert (problem.where, problem.code) == (f"{path}:2", "data.encoding")
    assert "0xbd" in problem.found
    assert "GBK/GB18030" in problem.found
    assert "encoding: gb18030" in problem.expected


@pytest.mark.parametrize("form", FORMATS)
def test_gbk_on_the_first_line(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "d.json", FORMATS[form](dumped(ROWS)).encode("gbk"))
    (row,) = read(path)
    assert isinstance(row.value, Problem)
    assert row.value.code == "data.encoding"
    assert "GBK/GB18030" in row.value.found


@pytest.mark.parametrize("form", FORMATS)
def test_gb18030_reads_it(tmp_path: Path, form: str, chunk_bytes: int) -> None:
    rows = [*ROWS, {"text": "𠮷野家，ㄅㄆㄇ"}]
    path = written(tmp_path / "d.json", FORMATS[form](dumped(rows)).encode("gb18030"))
    assert values(read(path, "gb18030")) == rows, chunk_bytes


def test_other_bad_bytes_get_no_chinese_hint(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", '{"text": "café, naïve"}\n'.encode("latin-1"))
    (row,) = read(path)
    assert isinstance(row.value, Problem)
    assert "0xe9" in row.value.found
    assert "GBK" not in row.value.found


def test_a_bad_byte_far_into_an_array(tmp_path: Path, chunk_bytes: int) -> None:
    lines = [line.encode() for line in dumped(ROWS)]
    lines[6] = lines[6].replace("第".encode(), b"\xff")
    path = written(tmp_path / "d.json", b"[\n" + b",\n".join(lines) + b"\n]")
    rows = read(path)
    bad = [row for row in rows if isinstance(row.value, Problem)]
    assert [row.origin.line for row in bad] == [8], chunk_bytes
    assert rows[-1] is bad[0]
    assert isinstance(bad[0].value, Problem)
    assert bad[0].value.where == f"{path}:8"
    assert "0xff" in bad[0].value.found


def test_an_unknown_encoding_is_the_user_s_mistake(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", '{"a": 1}\n')
    try:
        (row,) = read(path, "gb23l2")
    except UserError as error:
        assert "gb23l2" in str(error)
    else:
        assert isinstance(row.value, Problem)
        assert "gb23l2" in row.value.found


def test_utf_16_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", FORMATS["lines"](dumped(ROWS)).encode("utf-16"))
    assert values(read(path, "utf-16")) == ROWS


def test_utf_16_arrays(tmp_path: Path) -> None:
    path = written(tmp_path / "d.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-16"))
    assert values(read(path, "utf-16")) == ROWS


# Values that JSON allows and nothing behind it can take


@pytest.mark.parametrize("form", ["array", "lines"])
@pytest.mark.parametrize(
    "value",
    [r'"\ud83d"', "9" * 5000, "NaN", "[" * 90_000 + "]" * 90_000],
    ids=["lone surrogate", "5000 digits", "NaN", "deep nesting"],
)
def test_values_that_nothing_can_take(tmp_path: Path, form: str, value: str) -> None:
    (row,) = read(written(tmp_path / "d.json", FORMATS[form](['{"a": ' + value + "}"])))
    assert isinstance(row.value, Problem)
    assert row.value.code == "data.json"
    assert row.origin.line == 1


# Arrays, piece by piece

NESTED: list[dict[str, Any]] = [
    {"a": ']}[{,"', "b": "\\", "c": '\\\\"', "d": "line\nend\ttab\u0000"},
    {"list": [[], {}, [{"deep": [1, [2, [3]]]}], None, True, False]},
    {"numbers": [0, -1, 12345678901234567890, 1.5, -2.25e-10, 1e20, 3.0]},
    {"世界": "你好，🌍 𠮷", "escaped": "é\u2028"},
    {"": "", "spaces  ": "   "},
    {},
]


@pytest.mark.parametrize("ascii_only", [True, False])  # True writes surrogate escapes
@pytest.mark.parametrize("indent", [None, 0, 3])
def test_arrays_in_pieces_are_json_load(
    tmp_path: Path, ascii_only: bool, indent: int | None, chunk_bytes: int
) -> None:
    content = json.dumps(NESTED, ensure_ascii=ascii_only, indent=indent)
    path = written(tmp_path / "d.json", content)
    assert values(read(path)) == json.loads(content) == NESTED, chunk_bytes


def test_numbers_cut_between_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "d.json", '[{"a": 123456789, "b": 1.25e+2, "c": -12}]')
    for size in range(1, 40):
        monkeypatch.setattr(text, "CHUNK_BYTES", size)
        rows = [row.value for row in read_json_array(DataFile(path))]
        assert rows == [{"a": 123456789, "b": 125.0, "c": -12}]


def test_numbers_as_rows_cut_between_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "d.json", "[12345, 1.25e+2,12]")
    found: list[str] = []
    for size in range(1, 20):
        monkeypatch.setattr(text, "CHUNK_BYTES", size)
        found += [row.value.found for row in read_json_array(DataFile(path))]  # type: ignore
    assert found == ["a number"] * 3 * 19


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ('[\n{"a": 1},\n{"b": 2}', 3, "the end of the file"),
        ('[\n{"a": 1},\n{"b": 2},\n', 4, "broken JSON"),
        ('[\n{"a": 1},\n{"b": "half a te', 3, "broken JSON"),
        ('[\n{"a": 1},\n{"b": ', 3, "broken JSON"),
        ('[\n{"a": 1},\n{"b": 2\n', 4, "broken JSON"),
        ('[\n{"a": 1},\n', 3, "broken JSON"),
        ('[\n{"a": 1}\n{"b": 2}\n]', 3, "'{'"),
        ('[\n{"a": 1},\n]', 3, "broken JSON"),
    ],
)
def test_an_array_cut_off_in_the_middle(
    tmp_path: Path, content: str, line: int, found: str, chunk_bytes: int
) -> None:
    path = written(tmp_path / "d.json", content)
    rows = read(path)
    assert rows[0] == at(path, 2, {"a": 1})
    problem = rows[-1].value
    assert isinstance(problem, Problem)
    assert problem.code == "data.json"
    assert problem.where == f"{path}:{line}", chunk_bytes
    assert found in problem.found
    assert [row for row in rows[:-1] if isinstance(row.value, Problem)] == []


@pytest.mark.parametrize("content", ["[", "[ \n"])
def test_an_array_that_is_only_opened(tmp_path: Path, content: str) -> None:
    rows = read(written(tmp_path / "d.json", content))
    assert [isinstance(row.value, Problem) for row in rows] == [True]


@pytest.mark.parametrize("content", ['[{"a": 1}]\n[{"a": 2}]\n', "[]\n{}"])
def test_text_behind_the_array_is_a_problem(tmp_path: Path, content: str) -> None:
    rows = read(written(tmp_path / "d.json", content))
    assert isinstance(rows[-1].value, Problem)
    assert rows[-1].origin.line == 2


def test_a_missing_quote_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_scan, "MAX_ROW_CHARS", 1000)
    monkeypatch.setattr(text, "CHUNK_BYTES", 100)
    path = written(tmp_path / "d.json", '[{"a": "' + "x" * 100_000 + '"}]')
    pieces: list[str] = []
    real = text.read_chunks

    def counted(*args: Any) -> Any:
        for chunk in real(*args):
            pieces.append(str(chunk))
            yield chunk

    monkeypatch.setattr(json_scan, "read_chunks", counted)
    (row,) = read(path)
    assert isinstance(row.value, Problem)
    assert row.value.where == f"{path}:1"
    assert len(pieces) < 20


def test_a_huge_row_is_tried_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 100)
    lengths: list[int] = []
    real = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, content: str, at: int) -> Any:
        lengths.append(len(content) - at)
        return real(self, content, at)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    row = {"a": ["x" * 100] * 1000}
    assert values(read(written(tmp_path / "d.json", json.dumps([row])))) == [row]
    assert sum(lengths) < 4 * (tmp_path / "d.json").stat().st_size


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_one_long_line_is_read_in_little_memory(
    tmp_path: Path, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(json_form, "MAX_FIRST_LINE_CHARS", 1 << 14)
    rows = [{"n": n, "text": "天地玄黄" * 50} for n in range(5000)]
    path = written(tmp_path / "d.json", json.dumps(wrap(rows), ensure_ascii=False))
    meter, seen = Meter(), set[int]()
    tracemalloc.start()
    for n, row in enumerate(read_rows(path, meter=meter)):
        assert row.value == rows[n]
        seen.add(meter.bytes_read)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2_500_000
    assert peak < 500_000
    assert len(seen) > 100
    assert max(seen) == meter.bytes_read == path.stat().st_size


def test_arrays_are_read_as_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", 64)
    lines = dumped([{"text": "x" * 50}] * 100)
    path = written(tmp_path / "d.json", "[" + ",\n".join(lines) + '\n"broken')
    rows = read_rows(path)
    assert next(rows) == at(path, 1, {"text": "x" * 50})  # the broken end was not looked at
    rows.close()  # type: ignore[attr-defined]


# Round trip

JSON_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_TEXT
    | st.sampled_from(['"', "\\", "[]", "{},", "\r\n", "\u2028", "\x85", "🌍", "\\u00e9"])
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=3), max_size=4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    OBJECTS,
    st.sampled_from([None, 0, 1, 4, "\t"]),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_arrays_round_trip(
    rows: list[dict[str, Any]], indent: Any, size: int, ascii_only: bool, seed: int
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    spaces = "".join(random.Random(seed).choices(" \n\t\r", k=seed % 4))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", size)
        path = written(Path(folder) / "d.json", spaces + content + spaces)
        assert values(read(path)) == rows


@settings(max_examples=50, deadline=None, derandomize=True)
@given(OBJECTS.filter(bool), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_lines_round_trip(rows: list[dict[str, Any]], ascii_only: bool, newline: str) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "d.jsonl", newline.join(lines))
        assert values(read(path)) == rows
