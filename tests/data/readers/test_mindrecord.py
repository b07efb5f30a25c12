"""MindRecord files: the values MindSpore wrote, other files written here, and damaged ones."""

import json
import math
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.readers.mindrecord import mindrecord_shards, read_mindrecord
from tunesmith.errors import DataError, Problem

FIXTURES = Path(__file__).parents[1] / "mindrecord"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads(
    (FIXTURES / "expected_rows.json").read_text(encoding="utf-8")
)

INT_FIELD = {"ids": {"type": "int32", "shape": [-1]}}


def rows_of(path: Path) -> list[dict[str, Any] | Problem]:
    return [row for shard in mindrecord_shards(path) for _, row in read_mindrecord(shard)]


def error_of(path: Path) -> DataError:
    with pytest.raises(DataError) as raised:
        list(read_mindrecord(path))
    return raised.value


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(path: Path, **changes: Any) -> Path:
    """Writes other values into the header of a file."""
    encoded = json.dumps(header_of(path) | changes).encode()
    data = path.read_bytes()
    path.write_bytes((struct.pack("<Q", len(encoded)) + encoded).ljust(16384, b"\0") + data[16384:])
    return path


def framed(payloads: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(each)) + each for each in payloads)


def write_mindrecord(
    path: Path,
    fields: dict[str, Any],
    scalars: list[dict[str, Any]],
    blobs: list[list[bytes]],
    blob_fields: list[str],
) -> Path:
    """A file as MindSpore lays it out, with one page of each kind."""
    lone = len(blob_fields) == 1
    blob_rows = [
        b"".join(b if lone else struct.pack(">Q", len(b)) + b for b in row) for row in blobs
    ]
    blob_page = framed(blob_rows)
    raw_page = framed([msgspec.msgpack.encode(row) for row in scalars])
    page_size = max(32768, len(blob_page), len(raw_page))
    pages = [
        {"page_id": k, "page_type": kind, "page_type_id": 0, "page_size": len(content)}
        for k, (kind, content) in enumerate([("BLOB_DATA", blob_page), ("RAW_DATA", raw_page)])
    ]
    header = {
        "header_size": 16384,
        "page_size": page_size,
        "version": "3.0",
        "shard_id": 0,
        "shard_addresses": [path.name],
        "schema": [{"desc": "", "schema": fields, "blob_fields": blob_fields}],
        "page": pages,
    }
    encoded = json.dumps(header).encode()
    start = (struct.pack("<Q", len(encoded)) + encoded).ljust(16384, b"\0")
    path.write_bytes(start + blob_page.ljust(page_size, b"\0") + raw_page)
    return path


def packed(values: list[int]) -> bytes:
    """Integers in the fewest bytes each, behind their two-bit widths."""
    widths = [
        next(w for w in (1, 2, 4, 8) if -(1 << 8 * w - 1) <= v < 1 << 8 * w - 1) for v in values
    ]
    bits = "".join(f"{w.bit_length() - 1:02b}" for w in widths)
    codes = bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))
    body = b"".join(
        v.to_bytes(w, "little", signed=True) for v, w in zip(values, widths, strict=True)
    )
    return struct.pack(">I", len(values)) + codes + body


# What MindSpore wrote


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_equal_what_mindspore_reads(name: str) -> None:
    rows = rows_of(FIXTURES / f"{name}.mindrecord")
    assert rows == EXPECTED[name]
    assert json.loads(json.dumps(rows)) == EXPECTED[name]


def test_rows_are_numbered_from_one() -> None:
    numbers = [number for number, _ in read_mindrecord(FIXTURES / "many_pages.mindrecord")]
    assert numbers == list(range(1, 121))


def test_index_is_not_needed() -> None:
    assert not (FIXTURES / "no_index.mindrecord.db").exists()
    assert rows_of(FIXTURES / "no_index.mindrecord") == EXPECTED["qwen_qa"]


def test_index_is_never_opened(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "text.mindrecord", tmp_path))
    path.with_name("text.mindrecord.db").write_bytes(b"no database")
    assert rows_of(path) == EXPECTED["text"]


def test_float_fields_stay_floats() -> None:
    assert all(type(row["score"]) is float for row in rows_of(FIXTURES / "text.mindrecord"))


# Shards


@pytest.mark.parametrize(
    "given_name", ["llama_sft.mindrecord", *(f"llama_sft.mindrecord{k}" for k in range(3))]
)
def test_any_name_of_a_set_gives_all_shards(given_name: str) -> None:
    shards = mindrecord_shards(FIXTURES / given_name)
    assert shards == [FIXTURES / f"llama_sft.mindrecord{k}" for k in range(3)]


def test_a_single_file_is_its_own_set() -> None:
    path = FIXTURES / "no_index.mindrecord"  # its header still has the name it was written under
    assert mindrecord_shards(path) == [path]


def copied_set(folder: Path, name: str = "llama_sft.mindrecord") -> list[Path]:
    sources = [FIXTURES / f"llama_sft.mindrecord{k}" for k in range(3)]
    return [Path(shutil.copy(source, folder / f"{name}{k}")) for k, source in enumerate(sources)]


def test_renamed_shards_are_found(tmp_path: Path) -> None:
    shards = copied_set(tmp_path, "mine.data")
    assert mindrecord_shards(tmp_path / "mine.data") == shards
    assert mindrecord_shards(shards[2]) == shards


def test_addresses_with_folders_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    shards = copied_set(tmp_path)
    names = [f"/elsewhere/{shard.name}" for shard in shards]
    with_header(shards[0], shard_addresses=names)
    assert mindrecord_shards(shards[0]) == shards


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_absent_shard_is_named(tmp_path: Path, lost: int) -> None:
    shards = copied_set(tmp_path)
    shards[lost].unlink()
    with pytest.raises(DataError) as raised:
        mindrecord_shards(tmp_path / "llama_sft.mindrecord")
    assert raised.value.code == "data.missing-file"
    assert raised.value.where == str(shards[lost])
    assert f"shard {lost + 1} of 3" in str(raised.value)


def test_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    shards = copied_set(tmp_path)
    shutil.copy(FIXTURES / "qwen_qa.mindrecord", shards[1])
    with pytest.raises(DataError, match=r"shard 1 of 1 of another set; expected shard 2 of 3"):
        mindrecord_shards(shards[0])


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "text.mindrecord", tmp_path)
    with pytest.raises(DataError, match=r"did you mean .*text\.mindrecord\?") as raised:
        mindrecord_shards(tmp_path / "txt.mindrecord")
    assert raised.value.code == "data.missing-file"
    assert error_of(tmp_path / "nowhere" / "x.mindrecord").code == "data.missing-file"
    assert error_of(tmp_path).found == "a folder"
    with pytest.raises(DataError, match="no such file"):
        mindrecord_shards(tmp_path / "nowhere" / "x.mindrecord")


def test_file_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(FIXTURES / "text.mindrecord", tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    assert error_of(path).code == "data.unreadable"


# Values


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), min_size=1, max_size=5))
def test_any_integers_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("integers") / "x.mindrecord"
    fields = {"ids": {"type": "int64", "shape": [-1]}}
    write_mindrecord(
        path, fields, [{"id": 0}] * len(rows), [[packed(row)] for row in rows], ["ids"]
    )
    assert [row for _, row in read_mindrecord(path)] == [{"ids": row} for row in rows]


def test_scalars_arrays_and_bytes_share_a_row(tmp_path: Path) -> None:
    fields = {
        "image": {"type": "bytes"},
        "grid": {"type": "int32", "shape": [2, -1]},
        "text": {"type": "string"},
        "score": {"type": "float64"},
        "number": {"type": "int32"},
    }
    path = write_mindrecord(
        tmp_path / "x.mindrecord",
        fields,
        [{"text": "你好", "score": math.inf, "number": -1}],
        [[b"\xff\x00", packed([1, 200, 70_000, -5])]],
        ["image", "grid"],
    )
    expected = {
        "image": "ff00",
        "grid": [[1, 200], [70_000, -5]],
        "text": "你好",
        "score": math.inf,
    }
    assert rows_of(path) == [expected | {"number": -1}]


def test_text_may_lie_in_a_blob_page(tmp_path: Path) -> None:
    fields = {"text": {"type": "string"}}
    blobs = [["你好".encode()], [b"\xff"]]
    path = write_mindrecord(tmp_path / "x.mindrecord", fields, [{}, {}], blobs, ["text"])
    first, second = rows_of(path)
    assert first == {"text": "你好"}
    assert isinstance(second, Problem)


def test_a_last_text_may_end_like_the_encryption_trailer(tmp_path: Path) -> None:
    fields = {"text": {"type": "string"}}
    path = write_mindrecord(tmp_path / "x.mindrecord", fields, [{"text": "ENCRYPT"}], [[b""]], [])
    assert path.read_bytes().endswith(b"ENCRYPT")
    assert rows_of(path) == [{"text": "ENCRYPT"}]


def test_memory_is_bounded_by_a_row(tmp_path: Path) -> None:
    count, length = 200, 100_000
    path = write_mindrecord(
        tmp_path / "x.mindrecord",
        {"raw": {"type": "bytes"}},
        [{"id": 0}] * count,
        [[bytes(length)]] * count,
        ["raw"],
    )
    tracemalloc.start()
    assert sum(1 for _ in read_mindrecord(path)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 2_000_000


# Damage within a row: the other rows are read


@pytest.mark.parametrize(
    ("fields", "scalar", "blob", "blob_fields", "said"),
    [
        (INT_FIELD, {}, [b"\0\0\0\x09\0"], ["ids"], "9 integers in 5 bytes"),
        (INT_FIELD, {}, [b"\xff\xff\xff\xff\0"], ["ids"], "4294967295 integers in 5 bytes"),
        (INT_FIELD, {}, [packed([1, 2]) + b"x"], ["ids"], "2 integers in 8 bytes instead of 7"),
        (INT_FIELD, {}, [packed([1, 2])[:-1]], ["ids"], "2 integers in 6 bytes instead of 7"),
        ({"ids": {"type": "int32", "shape": [3]}}, {}, [packed([1])], ["ids"], "reshape"),
        ({"x": {"type": "float32", "shape": [-1]}}, {}, [b"123"], ["x"], "buffer size"),
        ({"t": {"type": "string"}}, {"t": 1}, [], [], "1 in the field 't'"),
        ({"t": {"type": "int64"}}, {"t": "1"}, [], [], "'1' in the field 't'"),
        ({"t": {"type": "float32"}}, {"t": None}, [], [], "None in the field 't'"),
        ({"t": {"type": "string"}}, {"t": [1]}, [], [], "damaged row"),
        ({"t": {"type": "string"}}, {"u": "x"}, [], [], "no field 't'"),
        ({"a": {"type": "bytes"}}, {"id": 0}, [], [], "no field 'a'"),
    ],
)  # fmt: skip
def test_damaged_row_is_a_problem(
    tmp_path: Path,
    fields: dict[str, Any],
    scalar: dict[str, Any],
    blob: list[bytes],
    blob_fields: list[str],
    said: str,
) -> None:
    path = write_mindrecord(tmp_path / "x.mindrecord", fields, [scalar], [blob], blob_fields)
    ((number, row),) = read_mindrecord(path)
    assert isinstance(row, Problem)
    assert (number, row.where, row.code) == (1, f"{path}:1", "data.mindrecord")
    assert said in row.found


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((999, 3), "the field 'a' reaches past the row's 24 bytes"),
        ((5, 4), "the field 'b' reaches past the row's 24 bytes"),
        ((5, 1), "2 bytes behind the last field"),
        ((2**64 - 1, 3), "the field 'a' reaches past"),
        ((16, 0), "the field 'b' reaches past"),
    ],
)
def test_wrong_lengths_inside_a_row(tmp_path: Path, lengths: tuple[int, int], said: str) -> None:
    fields = {"a": {"type": "bytes"}, "b": {"type": "bytes"}}
    blobs = [[b"12345", b"123"]]
    path = write_mindrecord(tmp_path / "x.mindrecord", fields, [{}], blobs, ["a", "b"])
    data = path.read_bytes()
    right = struct.pack(">Q", 5) + b"12345" + struct.pack(">Q", 3) + b"123"
    wrong = struct.pack(">Q", lengths[0]) + b"12345" + struct.pack(">Q", lengths[1]) + b"123"
    path.write_bytes(data.replace(right, wrong))
    ((_, row),) = read_mindrecord(path)
    assert isinstance(row, Problem)
    assert said in row.found


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "many_pages.mindrecord", tmp_path))
    rows = read_mindrecord(path)
    next(rows)
    os.truncate(path, 16384 + 32768)
    with pytest.raises(DataError, match="a file that became shorter"):
        list(rows)


def test_text_that_is_not_utf8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    fields = {"t": {"type": "string"}}
    rows = [{"t": "aa"}, {"t": "bb"}]
    path = write_mindrecord(tmp_path / "x.mindrecord", fields, rows, [[], []], [])
    path.write_bytes(path.read_bytes().replace(b"aa", b"\xff\xff"))
    first, second = [row for _, row in read_mindrecord(path)]
    assert isinstance(first, Problem)
    assert second == {"t": "bb"}


# Damage to the file


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 400, 742])
def test_file_cut_off_in_the_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.mindrecord"
    path.write_bytes((FIXTURES / "qwen_qa.mindrecord").read_bytes()[:size])
    assert error_of(path).code == "data.mindrecord"


@pytest.mark.parametrize("size", [743, 16384, 16390, 20_000, 49152, 49300, 49307])
def test_file_cut_off_in_the_pages(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.mindrecord"
    path.write_bytes((FIXTURES / "qwen_qa.mindrecord").read_bytes()[:size])
    error = error_of(path)
    assert error.code == "data.mindrecord"
    assert error.found == f"{size} bytes"
    assert error.try_ is not None
    assert "cut off" in error.try_


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200 << 20, 49309, 0])
def test_header_with_a_wrong_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.mindrecord"
    data = (FIXTURES / "qwen_qa.mindrecord").read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    if length == 200 << 20:
        os.truncate(path, 300 << 20)  # sparse: the length would fit the file
    tracemalloc.start()
    error = error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert error.code == "data.mindrecord"


def test_encrypted_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mindrecord"
    path.write_bytes(os.urandom(4096) + b"ENCRYPT")
    error = error_of(path)
    assert error.code == "data.mindrecord"
    assert "encrypted" in error.found
    with pytest.raises(DataError, match="encrypted"):
        mindrecord_shards(path)


@pytest.mark.parametrize("text", ["{}", "not JSON", "[" * 100_000, '{"a": "\\ud800"}', "\xff"])
def test_header_that_is_not_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.mindrecord"
    encoded = text.encode("latin-1")
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    error = error_of(path)
    assert error.code == "data.mindrecord"
    assert "header that cannot be read" in error.found


PAGE = {"page_id": 0, "page_type": "RAW_DATA", "page_type_id": 0, "page_size": 156}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "4.0"}, "version '4.0'"),
        ({"schema": []}, "0 schemas"),
        ({"shard_id": 3}, "shard number 3 of 1"),
        ({"shard_addresses": []}, "shard number 0 of 0"),
        ({"shard_addresses": [""]}, "the shards ['']"),
        ({"shard_addresses": ["a\0b"]}, "the shards"),
        ({"header_size": 10}, "a header of 10 bytes"),
        ({"page_size": 0}, "pages of 0 bytes"),
        ({"page_size": -1}, "cannot be read"),
        ({"header_size": 1 << 60}, "cannot be read"),
        ({"page": [PAGE | {"page_size": 40_000}]}, "page 0 with 40000 bytes"),
        ({"page": [PAGE | {"page_id": 1 << 40}]}, "49308 bytes"),
        ({"page": [PAGE | {"page_id": -1}]}, "cannot be read"),
        ({"page": [PAGE | {"page_type": "OTHER"}]}, "cannot be read"),
        ({"schema": [{"schema": {}, "blob_fields": ["x"]}]}, "the field 'x' without a type"),
        ({"schema": [{"schema": {"x": {"type": "int8"}}}]}, "cannot be read"),
    ],
)  # fmt: skip
def test_header_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = Path(shutil.copy(FIXTURES / "qwen_qa.mindrecord", tmp_path / "x.mindrecord"))
    error = error_of(with_header(path, **changes))
    assert error.code == "data.mindrecord"
    assert said in error.found


def test_row_that_leaves_its_page(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "qwen_qa.mindrecord", tmp_path / "x.mindrecord"))
    data = bytearray(path.read_bytes())
    data[16384:16392] = struct.pack("<Q", 1 << 62)
    path.write_bytes(data)
    assert error_of(path).found == f"a row of {1 << 62} bytes at byte 16392"


@pytest.mark.parametrize(("kind", "at"), [("BLOB", 0), ("RAW", 1)])
def test_pages_with_unequal_numbers_of_rows(tmp_path: Path, kind: str, at: int) -> None:
    path = Path(shutil.copy(FIXTURES / "qwen_qa.mindrecord", tmp_path / "x.mindrecord"))
    pages = header_of(path)["page"]
    pages[at]["page_size"] = 0
    assert f"no row 1 in the {kind} pages" in error_of(with_header(path, page=pages)).found


def test_file_without_pages_has_no_rows(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "qwen_qa.mindrecord", tmp_path / "x.mindrecord"))
    assert rows_of(with_header(path, page=None)) == []


@given(st.integers(0, 49307), st.integers(1, 255))
def test_no_flipped_byte_brings_another_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    data = bytearray((FIXTURES / "qwen_qa.mindrecord").read_bytes())
    data[place if place % 2 else place % 743] ^= change
    path = tmp_path_factory.mktemp("flipped") / "x.mindrecord"
    path.write_bytes(data)
    try:
        rows = list(read_mindrecord(path))
    except DataError as error:
        assert error.code == "data.mindrecord"
    else:
        assert len(rows) in (0, 12)
