"""Bytes to lines: encodings, line ends, bad bytes and lines without an end."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.readers import Row, read_rows, text
from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.text import read_lines
from tunesmith.errors import DataError, Problem


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, encoding: str = "auto") -> list[Row]:
    return list(read_rows(path, encoding=encoding))


def problem(row: Row) -> Problem:
    assert isinstance(row.value, Problem)
    return row.value


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_marks_decide(tmp_path: Path, encoding: str, newline: str, chunk_bytes: int) -> None:
    content = newline.join(['{"第": "一"}', "", '{"第": "二 🌍"}', ""])
    rows = read(written(tmp_path / "d.jsonl", content.encode(encoding)))
    assert [(row.origin.line, row.value) for row in rows] == [
        (1, {"第": "一"}),
        (3, {"第": "二 🌍"}),
    ], chunk_bytes


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_mark_is_named(tmp_path: Path, order: str) -> None:
    path = written(tmp_path / "d.jsonl", '{"问": "答"}\n'.encode(f"utf-16-{order}"))
    (row,) = read(path)
    assert problem(row).code == "data.encoding"
    assert f"encoding: utf-16-{order}" in problem(row).expected
    assert [row.value for row in read(path, f"utf-16-{order}")] == [{"问": "答"}]


def test_bad_bytes_have_lines_columns_and_offsets(tmp_path: Path, chunk_bytes: int) -> None:
    content = '{"a": 1}\r\n{"é": "?"}\n{"b": 2}\n{"c": "??"}\n{"d": 3}'.encode()
    content = content.replace(b"??", b"\xff\xfe").replace(b"?", b"\xe9")
    path = written(tmp_path / "d.jsonl", content)
    rows = read(path)
    assert [row.origin.line for row in rows] == [1, 2, 3, 4, 5], chunk_bytes
    bad = [problem(row) for row in rows if isinstance(row.value, Problem)]
    assert [row.where for row in bad] == [f"{path}:2", f"{path}:4"]
    first, second = content.index(b"\xe9"), content.index(b"\xff")
    assert f"byte 0xe9 at column 8, offset {first}," in bad[0].found
    assert f"byte 0xff at column 8, offset {second}," in bad[1].found
    assert [row.value for row in rows[::2]] == [{"a": 1}, {"b": 2}, {"d": 3}]


def test_one_bad_byte_in_chinese_utf_8_is_not_taken_for_gbk(tmp_path: Path) -> None:
    lines = [f'{{"第{n}": "今天天气很好，我们去公园散步。"}}'.encode() for n in range(5)]
    lines[2] = lines[2].replace("气".encode(), "气".encode()[:2])
    rows = read(written(tmp_path / "d.jsonl", b"\n".join(lines)))
    assert len(rows) == 5
    assert "GBK" not in problem(rows[2]).found


def test_text_that_ends_inside_a_character(tmp_path: Path, chunk_bytes: int) -> None:
    content = '{"a": 1}\n{"b": "天'.encode()[:-1]
    good, bad = read(written(tmp_path / "d.jsonl", content))
    assert good.value == {"a": 1}
    assert "0xe5 at column 8, offset 16" in problem(bad).found, chunk_bytes


def test_gbk_is_not_read_on(tmp_path: Path) -> None:
    content = '{"a": 1}\n' + '{"b": "今天天气很好，我们去公园散步。"}\n' * 50
    rows = read(written(tmp_path / "d.jsonl", content.encode("gbk")))
    assert len(rows) == 2
    assert "GBK/GB18030" in problem(rows[1]).found


def test_files_of_other_encodings_end_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_BAD_BYTES", 10)
    path = written(tmp_path / "d.jsonl", b'{"a": 1}\n' + b'{"caf\xe9": 1}\n' * 100)
    assert len(read(path)) == 12


def test_bad_utf_16_is_not_read_on(tmp_path: Path) -> None:
    content = '{"a": 1}\n{"b": 2}\n'.encode("utf-16") + b"\x00\xdc\x00\xdc" + b"\n\0" * 5
    rows = read(written(tmp_path / "d.jsonl", content))
    assert [row.value for row in rows[:2]] == [{"a": 1}, {"b": 2}]
    assert problem(rows[2]).code == "data.encoding"
    assert len(rows) == 3


def test_lines_without_an_end_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_ROW_CHARS", 100)
    monkeypatch.setattr(text, "CHUNK_BYTES", 16)
    content = b'{"a": 1}\n{"b": "' + b"x" * 1000 + b'"}\n{"c": 3}\n'
    first, long, last = read(written(tmp_path / "d.jsonl", content))
    assert (problem(long).code, problem(long).where) == (
        "data.long-row",
        f"{tmp_path / 'd.jsonl'}:2",
    )
    assert (first.value, last.value) == ({"a": 1}, {"c": 3})


def test_other_line_breaks_of_unicode_break_no_line(tmp_path: Path) -> None:
    content = '{"a": "1\u20282\x853\u2029"}\n'.encode()
    assert [row.value for row in read(written(tmp_path / "d.jsonl", content))] == [
        {"a": "1\u20282\x853\u2029"}
    ]


@pytest.mark.parametrize("name", ["hex", "no-such", "base64"])
def test_names_that_are_no_text_encodings(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read(written(tmp_path / "d.jsonl", b"{}"), name)
    assert caught.value.code == "data.encoding"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_the_c_locale_changes_nothing(tmp_path: Path, name: str) -> None:
    rows = {
        "d.jsonl": '{"问": "答"}\n{"问": "好"}\n',
        "d.json": '[{"问": "答"}]',
        "d.csv": "问\n答\n",
        "d.txt": "问答",
    }
    path = written(tmp_path / name, rows[name].encode())
    code = (
        "import sys, pathlib; from tunesmith.data.readers import read_rows;"
        "print(ascii([row.value for row in read_rows(pathlib.Path(sys.argv[1]))]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ascii([row.value for row in read(path)])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text(alphabet=st.sampled_from("a天🌍\r\n\u2028 "), max_size=30),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"]),
    st.integers(1, 9),
)
def test_lines_are_those_of_python(content: str, encoding: str, size: int) -> None:
    expected = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not expected[-1]:
        expected.pop()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", size)
        path = written(Path(folder) / "d.txt", content.encode(encoding))
        name = "auto" if encoding != "gb18030" else encoding
        lines = list(read_lines(DataFile(path, name)))
    assert lines == list(enumerate(expected, start=1))
