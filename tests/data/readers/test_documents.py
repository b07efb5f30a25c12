"""Plain text: one document per file, long ones in pieces of which nothing is lost."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.readers import documents, read_rows, text
from tunesmith.errors import Problem


def written(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def read(path: Path) -> list[tuple[int, object]]:
    return [(row.origin.line, row.value) for row in read_rows(path)]


@pytest.mark.parametrize("ending", [".txt", ".md"])
def test_a_file_is_a_document(tmp_path: Path, ending: str) -> None:
    content = "# 标题\r\n\r\n第一段。\r\n\r\n{第二段}\r\n"
    path = written(tmp_path / f"d{ending}", content)
    assert read(path) == [(1, {"text": content.replace("\r\n", "\n")})]


@pytest.mark.parametrize(
    ("break_", "ends"), [("\n\n", 3), ("\n", 2), ("。", 0), (". ", 0), (" ", 0), ("", 0)]
)
def test_long_text_is_cut_where_it_breaks(
    tmp_path: Path, break_: str, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    monkeypatch.setattr(text, "CHUNK_BYTES", 64)
    content = ("x" * 30 + break_) * 20
    rows = read(written(tmp_path / "d.txt", content))
    pieces = [value["text"] for _, value in rows if isinstance(value, dict)]
    assert "".join(pieces) == content
    assert all(50 <= len(piece) <= 100 for piece in pieces[:-1])
    assert all(piece.endswith(break_) for piece in pieces)
    assert rows[1][0] == 1 + content[: len(pieces[0])].count("\n"), ends


def test_markdown_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    content = "word\n\n" * 100
    assert read(written(tmp_path / "d.md", content)) == [(1, {"text": content})]
    monkeypatch.setattr(documents, "MAX_ROW_CHARS", 100)
    ((line, problem),) = read(tmp_path / "d.md")
    assert isinstance(problem, Problem)
    assert (line, problem.code) == (1, "data.long-row")


@pytest.mark.parametrize("ending", [".txt", ".md"])
def test_a_blank_file_is_one_problem(tmp_path: Path, ending: str) -> None:
    ((_, problem),) = read(written(tmp_path / f"d{ending}", "\n  \n"))
    assert isinstance(problem, Problem)
    assert problem.code == "data.empty-file"


@pytest.mark.parametrize("ending", [".txt", ".md"])
def test_a_bad_byte_costs_the_document(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"d{ending}"
    path.write_bytes(b"good\nbad \xff\n")
    ((_, problem),) = read(path)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where) == ("data.encoding", f"{path}:2")


def test_json_in_a_txt_file_is_json(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", '\ufeff\n{"a": 1}\n{"a": 2}\n')) == [
        (2, {"a": 1}),
        (3, {"a": 2}),
    ]
    assert read(written(tmp_path / "b.txt", '[\n {"a": 1}]')) == [(2, {"a": 1})]
    prose = "[1] A note {in braces}\n"
    assert read(written(tmp_path / "c.txt", prose)) == [(1, {"text": prose})]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from("ab \n。.天"), min_size=1, max_size=80))
def test_nothing_is_lost(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", 8)
        patch.setattr(text, "CHUNK_BYTES", 5)
        rows = read(written(Path(folder) / "d.txt", content))
    pieces = [value["text"] for _, value in rows if isinstance(value, dict)]
    assert all(piece.strip() for piece in pieces)
    place = 0
    for (line, _), piece in zip(rows, pieces, strict=False):
        start = content.index(piece, place)
        assert not content[place:start].strip()
        assert line == 1 + content[:start].count("\n")
        place = start + len(piece)
    assert not content[place:].strip()
