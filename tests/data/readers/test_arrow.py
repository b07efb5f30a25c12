"""Parquet and Arrow tables: values as JSON, rows counted, damage in plain words."""

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.readers import Meter, arrow, read_rows
from tunesmith.errors import DataError, Problem

TALKS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"第{n}问 🌍", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": n}]},
        ],
        "n": n,
        "ok": n % 2 == 0,
    }
    for n in range(5)
]


@pytest.fixture(params=["parquet", "stream", "file"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(folder: Path, table: pa.Table, form: str) -> Path:
    path = folder / ("表.parquet" if form == "parquet" else "表.arrow")
    if form == "parquet":
        pq.write_table(table, path, row_group_size=2)
        return path
    opened = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def values(path: Path) -> list[Any]:
    return [row.value for row in read_rows(path)]


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return caught.value


@pytest.mark.parametrize("at_once", [1, 3, 500])
def test_rows(tmp_path: Path, form: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "ROWS_AT_ONCE", at_once)
    path = saved(tmp_path, pa.Table.from_pylist(TALKS), form)
    meter = Meter(bytes_read=1000)
    rows = list(read_rows(path, meter=meter))
    assert [row.value for row in rows] == TALKS
    assert [str(row.origin) for row in rows] == [f"{path}:{n}" for n in range(1, 6)]
    assert meter.bytes_read == 1000 + path.stat().st_size


def test_values_that_json_has_no_word_for(tmp_path: Path, form: str) -> None:
    columns: dict[str, Any] = {
        "bytes": pa.array(["文".encode(), b"\xff\xd8\xff\xe0", None], pa.binary()),
        "picture": [{"bytes": b"\x89PNG\xff", "path": "a.png"}, None, {"bytes": None, "path": ""}],
        "number": [1.5, float("nan"), None],
        "day": [datetime.date(2024, 1, 2), None, None],
        "moment": [datetime.datetime(2024, 1, 2, 3, 4), None, None],
        "price": [decimal.Decimal("1.50"), None, None],
        "length": [datetime.timedelta(seconds=90), None, None],
        "map": pa.array([[("a", 1.0)], [], None], pa.map_(pa.string(), pa.float64())),
        "id": pa.array([uuid.UUID(int=5).bytes, None, None], pa.uuid()),
        "scores": [[1.5, float("inf")], [], None],
        "kind": pa.array(["x", "y", None]).dictionary_encode(),
        "nothing": pa.nulls(3),
        "large": pa.array([["x"], [], None], pa.large_list(pa.large_string())),
    }
    first, second, third = values(saved(tmp_path, pa.table(columns), form))
    assert first == {
        "bytes": "文",
        "picture": {"bytes": None, "path": "a.png"},
        "number": 1.5,
        "day": "2024-01-02",
        "moment": "2024-01-02T03:04:00",
        "price": "1.50",
        "length": "0:01:30",
        "map": {"a": 1.0},
        "id": "00000000-0000-0000-0000-000000000005",
        "scores": [1.5, None],
        "kind": "x",
        "nothing": None,
        "large": ["x"],
    }
    assert (second["bytes"], second["number"], second["map"], second["kind"]) == (
        None,
        None,
        {},
        "y",
    )
    assert {name for name, value in third.items() if value is not None} == {"picture"}


def test_text_that_is_no_text_costs_its_row(tmp_path: Path, form: str) -> None:
    raw = pa.array([b"a", b"caf\xe9", b"c"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = saved(tmp_path, pa.table({"n": [1, 2, 3], "text": text}), form)
    first, bad, last = values(path)
    assert (first, last) == ({"n": 1, "text": "a"}, {"n": 3, "text": "c"})
    assert isinstance(bad, Problem)
    assert (bad.code, bad.where) == ("data.encoding", f"{path}:2")
    assert "column `text`" in bad.found


def test_dates_that_no_calendar_has(tmp_path: Path, form: str) -> None:
    day = pa.array([0, 2**60], pa.timestamp("ms"))
    first, bad = values(saved(tmp_path, pa.table({"day": day}), form))
    assert first == {"day": "1970-01-01T00:00:00"}
    assert isinstance(bad, Problem)
    assert bad.code == "data.row"


def test_two_columns_of_one_name(tmp_path: Path, form: str) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert refusal(saved(tmp_path, table, form)).code == "data.header"


def test_no_rows(tmp_path: Path, form: str) -> None:
    assert values(saved(tmp_path, pa.table({"a": pa.array([], pa.string())}), form)) == []


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_files_that_are_cut_off(tmp_path: Path, form: str, share: float) -> None:
    path = saved(tmp_path, pa.Table.from_pylist(TALKS), form)
    content = path.read_bytes()
    path.write_bytes(content[: max(4, int(share * len(content)))])
    error = refusal(path)
    assert error.code == ("data.parquet" if form == "parquet" else "data.arrow")
    assert error.found.startswith("a damaged file (")
    assert "\n" not in error.found


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_other_files_of_that_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"a": 1}\n' * 100)
    assert refusal(path).code in ("data.parquet", "data.arrow")


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    error = refusal(path)
    assert error.code == "data.lfs-pointer"
    assert error.try_ == "git lfs pull, or download the file again"
