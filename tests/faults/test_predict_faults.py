"""An interrupted prediction: the same command goes on, and every row is there once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import make_rows
from faults.runs import KILLED, start, tunesmith

pytestmark = pytest.mark.slow

NUM_ROWS = 12


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(NUM_ROWS)))
    return path


def arguments(model: Path, data: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("predict", str(model), str(data), "-o", str(out), "--max-new-tokens", "6", *more)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "way", [("-t", "0"), ("-t", "1.0", "--seed", "3")], ids=["greedy", "drawn"]
)
def test_row_15_sigkill_in_a_prediction(
    tiny_model_folder: Path, data: Path, tmp_path: Path, way: tuple[str, ...]
) -> None:
    """SIGKILL in the middle, twice: the file equals that of an uninterrupted prediction."""
    log = tmp_path / "log"
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert tunesmith(*arguments(tiny_model_folder, data, whole, *way), log=log) == 0
    command = arguments(tiny_model_folder, data, out, *way)
    for count in (4, 3):
        assert tunesmith(*command, log=log, fault=f"predict.row:{count}:kill") == KILLED
    assert len(rows_of(out)) == 5
    with out.open("ab") as file:
        file.write('{"id": "cut, in the middle of 字'.encode()[:-1])
    assert tunesmith(*command, log=log) == 0, log.read_text()[-3000:]
    assert out.read_bytes() == whole.read_bytes()
    assert [row["line"] for row in rows_of(out)] == list(range(1, NUM_ROWS + 1))
    assert "5 of 12 rows are there already" in log.read_text(encoding="utf-8")


def test_row_15_sigint_in_a_prediction(tiny_model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C: exit 130, all rows that ended are there, and it is said that it goes on."""
    log, out = tmp_path / "log", tmp_path / "out.jsonl"
    command = arguments(tiny_model_folder, data, out)
    assert tunesmith(*command, log=log, fault="predict.row:4:int") == 128 + signal.SIGINT
    assert "run the same command again" in log.read_text(encoding="utf-8")
    assert len(rows_of(out)) == 3
    assert tunesmith(*command, log=log) == 0
    assert len({row["id"] for row in rows_of(out)}) == NUM_ROWS


def test_row_15_disk_full_in_a_prediction(
    tiny_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """A full disk: exit 6 with the file's name; what was written is sound."""
    log, out = tmp_path / "log", tmp_path / "out.jsonl"
    command = arguments(tiny_model_folder, data, out)
    assert tunesmith(*command, log=log, TEST_FILE_LIMIT="2000") == 6
    assert "disk.full" in log.read_text(encoding="utf-8")
    assert tunesmith(*command, log=log) == 0, log.read_text()[-3000:]
    assert len(rows_of(out)) == NUM_ROWS


def test_row_15_two_predictions_into_one_file(
    tiny_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The second one ends with exit 7; the first is not disturbed."""
    log, other, out = tmp_path / "log", tmp_path / "other", tmp_path / "out.jsonl"
    command = arguments(tiny_model_folder, data, out)
    child = start(*command, log=log, fault="predict.row:3:sleep:3")
    child.wait_for('"id"', out)
    assert tunesmith(*command, log=other) == 7
    assert child.wait() == 0
    assert len(rows_of(out)) == NUM_ROWS
    assert os.path.exists(f"{out}.settings.json")
