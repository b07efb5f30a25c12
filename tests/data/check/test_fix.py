"""Cleaned copies: every good row once, every other row in a list with its reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.check.checker import Dropped
from tunesmith.data.check.fix import Fixed, check_target, write_fixed
from tunesmith.data.readers import read_rows
from tunesmith.data.readers.workbook import write_workbook
from tunesmith.data.sources import Source
from tunesmith.errors import DataError, Problem
from tunesmith.types import Origin

GOOD = '{"question": "多少钱？", "answer": "十元"}'


@pytest.fixture
def fix(tmp_path: Path) -> Callable[..., Fixed]:
    """Writes `content` to a file and fixes it, without the rows of the lines named."""

    def run(content: str, target: str, *lines: int, **source: Any) -> Fixed:
        path = tmp_path / "rows.jsonl"
        path.write_text(content, encoding="utf-8")
        dropped = Dropped({Origin(str(path), line): problem_at(f"{path}:{line}") for line in lines})
        config = SourceConfig(path=str(path), **source)
        return write_fixed([Source(config, (path,))], dropped, tmp_path / target)

    return run


def problem_at(where: str) -> Problem:
    return Problem(where, "data.duplicate", "the same as row 1", "each row once")


def listed(fixed: Fixed) -> list[dict[str, Any]]:
    lines = fixed.list_path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_good_rows_stay_as_they_are(fix: Callable[..., Fixed]) -> None:
    fixed = fix(f"{GOOD}\n{{broken\n{GOOD}\n" + '{"a": 1}\n', "new/clean.jsonl", 3)
    assert (fixed.kept, fixed.dropped) == (1, 3)
    assert fixed.path.read_text(encoding="utf-8") == f"{GOOD}\n"
    assert [entry["code"] for entry in listed(fixed)] == [
        "data.json",
        "data.duplicate",
        "data.columns",
    ]
    assert [entry["row"] for entry in listed(fixed)] == [None, json.loads(GOOD), {"a": 1}]
    assert listed(fixed)[1]["where"].endswith("rows.jsonl:3")


def test_a_table_that_excel_reads(fix: Callable[..., Fixed]) -> None:
    more = '{"question": "a,\\"b\\"\\nc", "answer": "=1+1", "tags": ["x"], "n": null}'
    fixed = fix(f"{GOOD}\n{more}\n", "clean.csv")
    content = fixed.path.read_bytes()
    assert content.startswith(b"\xef\xbb\xbfquestion,answer,tags,n\n")
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines(keepends=True)))
    assert [row["question"] for row in rows] == ["多少钱？", 'a,"b"\nc']
    assert (rows[0]["tags"], rows[1]["tags"], rows[1]["n"]) == ("", '["x"]', "")
    assert [row.value for row in read_rows(fixed.path)] == rows


def test_a_workbook_goes_back_into_its_sheet(tmp_path: Path) -> None:
    book = tmp_path / "客服.xlsx"
    table = [["多少钱？", "十元"], ["大吗？", ""], ["多少钱？", "十元"]]
    write_workbook(book, ["问题", "回答"], table, sheet="问答")
    source = Source(SourceConfig(path=str(book)), (book,))
    dropped = Dropped({Origin(str(book), 4, "问答"): problem_at("客服.xlsx:问答!A4")})
    fixed = write_fixed([source], dropped, tmp_path / "clean.xlsx")
    (row,) = read_rows(fixed.path)
    assert row.value == {"问题": "多少钱？", "回答": "十元"}
    assert row.origin.sheet == "问答"
    assert [Path(entry["where"]).name for entry in listed(fixed)] == [
        "客服.xlsx:问答!B3",
        "客服.xlsx:问答!A4",
    ]


def test_as_many_rows_as_are_read(fix: Callable[..., Fixed]) -> None:
    fixed = fix(f"{GOOD}\n" * 5, "clean.jsonl", limit=3)
    assert (fixed.kept, fixed.dropped) == (3, 0)


def test_nothing_left(fix: Callable[..., Fixed]) -> None:
    for target in ("clean.jsonl", "clean.csv", "clean.xlsx"):
        assert fix("{broken\n", target).kept == 0


@pytest.mark.parametrize(
    ("target", "found"),
    [("rows.jsonl", "a file that the data is read from"), ("clean.txt", "'.txt'"), ("x", "''")],
)
def test_targets_that_are_refused(tmp_path: Path, target: str, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        check_target(tmp_path / target, [Source(SourceConfig(path=str(path)), (path,))])
    assert (caught.value.code, caught.value.found) == ("data.fix-target", found)
    assert path.read_text(encoding="utf-8") == GOOD
