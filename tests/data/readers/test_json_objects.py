"""JSON objects: lines, one object over many lines, and objects around a list of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.readers import Meter, json_form, read_rows, text
from tunesmith.errors import Problem

ROWS: list[dict[str, Any]] = [{"question": f"第{n}问", "answer": f"答{n}"} for n in range(4)]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]}


@pytest.fixture(params=[3, 50, 1 << 20], autouse=True)
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(text, "CHUNK_BYTES", request.param)
    return request.param


def read(tmp_path: Path, content: str) -> list[tuple[int, Any]]:
    path = tmp_path / "d.json"
    path.write_bytes(content.encode())
    return [(row.origin.line, row.value) for row in read_rows(path)]


def values(rows: list[tuple[int, Any]]) -> list[Any]:
    return [value for _, value in rows]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "wrapper",
    [
        {"data": ROWS},
        {"version": "1.1", "meta": {"n": [1, {}]}, "data": ROWS},
        {"RECORDS": ROWS, "total": 4, "tags": ["a"]},
    ],
)
def test_the_list_inside_an_object(
    tmp_path: Path, wrapper: dict[str, Any], indent: int | None
) -> None:
    content = json.dumps(wrapper, ensure_ascii=False, indent=indent)
    rows = read(tmp_path, content)
    assert values(rows) == ROWS
    lines = content.split("\n")
    if indent:
        assert all(lines[line - 1].strip() == "{" for line, _ in rows)


@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_is_no_wrapper(tmp_path: Path, indent: int | None) -> None:
    for row in (TALK, {"instruction": "x", "output": "y"}, {}, {"tags": [1, 2]}, {"data": []}):
        assert read(tmp_path, "\n" + json.dumps(row, indent=indent)) == [(2, row)]


def test_pretty_printed_objects_one_after_the_other(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(row, indent=1) for row in [TALK, *ROWS])
    rows = read(tmp_path, content)
    assert values(rows) == [TALK, *ROWS]
    assert rows[1][0] == 1 + json.dumps(TALK, indent=1).count("\n") + 1


def test_lines_stay_lines(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(row) for row in [{"data": ROWS}, TALK])
    assert values(read(tmp_path, content)) == [{"data": ROWS}, TALK]


def test_a_broken_first_line_costs_that_line(tmp_path: Path) -> None:
    first, second = read(tmp_path, '{"a": 1,}\n\n{"a": 2}\n')
    assert isinstance(first[1], Problem)
    assert (first[0], first[1].code) == (1, "data.json")
    assert second == (3, {"a": 2})


def test_lines_that_are_nested_too_deep(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 90_000 + "]" * 90_000 + "}"
    (_, problem), last = read(tmp_path, f"{deep}\n{{}}\n")
    assert isinstance(problem, Problem)
    assert problem.found == "broken JSON: nested too deep"
    assert last == (2, {})


def test_a_broken_second_line_costs_that_line(tmp_path: Path) -> None:
    rows = read(tmp_path, '{"a": 1}\n"a": 2}\n{"a": 3}\n')
    assert isinstance(rows[1][1], Problem)
    assert [line for line, _ in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        ('{"train": [{"a": 1}],\n "test": [{"a": 2}]}', 2, "a second list of objects, `test`"),
        ('{"data": [{"a": 1}]\n', 2, "the end of the file"),
        ('{"data": [{"a": 1}\n', 2, "the end of the file"),
        ('{"data": [{"a": 1}\n]}\n\n{"data": []}', 4, "'{'"),
        ('{"data": [{"a": 1}],\n}', 2, "no name in quotes"),
        ('{"data": [{"a": 1}],\n "b" 3}', 2, "'3'"),
    ],
)
def test_broken_wrappers(tmp_path: Path, content: str, line: int, found: str) -> None:
    good, (where, problem) = read(tmp_path, content)
    assert good[1] == {"a": 1}
    assert isinstance(problem, Problem)
    assert (where, problem.code) == (line, "data.json")
    assert found in problem.found


@pytest.mark.parametrize("content", ["{", '{\n"a"', '{"a": [', '{\n"a":', '{\n"a": 1', "{'a': 1}"])
def test_objects_cut_off(tmp_path: Path, content: str) -> None:
    ((line, problem),) = read(tmp_path, content)
    assert isinstance(problem, Problem)
    assert problem.code == "data.json"
    assert line == 1 + content.count("\n")


def test_a_long_first_line_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_form, "MAX_FIRST_LINE_CHARS", 20)
    content = "\n".join(json.dumps(row) for row in [TALK, *ROWS])
    assert values(read(tmp_path, content)) == [TALK, *ROWS]


def test_looking_at_the_beginning_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    meter = Meter()
    assert len(list(read_rows(path, meter=meter))) == 4
    assert meter.bytes_read == path.stat().st_size
