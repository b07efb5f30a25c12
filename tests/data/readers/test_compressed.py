"""Packed files: what is read before the damage, and how the meter counts."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tunesmith.data.readers import Meter, read_rows, text, total_bytes
from tunesmith.errors import DataError, Problem

random.seed(0)
LINES = [{"n": n, "text": "".join(random.choices("天地玄黄宇宙洪荒abc", k=50))} for n in range(500)]
CONTENT = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(params=PACKERS)
def ending(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_rows(tmp_path: Path, ending: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", size)
    path = written(tmp_path / f"d.jsonl{ending}", PACKERS[ending](CONTENT))
    meter, seen = Meter(), set[int]()
    rows: list[object] = []
    for row in read_rows(path, meter=meter):
        rows.append(row.value)
        seen.add(meter.bytes_read)
    assert rows == LINES
    assert meter.bytes_read == total_bytes([path]) == max(seen)


def test_several_frames(tmp_path: Path, ending: str) -> None:
    half = CONTENT.index(b"\n") + 1
    pack = PACKERS[ending]
    path = written(tmp_path / f"d.jsonl{ending}", pack(CONTENT[:half]) + pack(CONTENT[half:]))
    assert [row.value for row in read_rows(path)] == LINES


@pytest.mark.parametrize(
    ("name", "content", "value"),
    [
        ("d.csv", "\ufeff问题\r\n答\r\n".encode(), {"问题": "答"}),
        ("d.CSV", "问题\n答\n".encode("utf-16"), {"问题": "答"}),
        ("d.tsv", b"a\tb\n1\t2\n", {"a": "1", "b": "2"}),
        ("d.json", b'{"data": [{"a": 1}]}', {"a": 1}),
        ("d.txt", b"text", {"text": "text"}),
        ("d.md", b"text", {"text": "text"}),
    ],
)
def test_every_text_format(
    tmp_path: Path, ending: str, name: str, content: bytes, value: object
) -> None:
    path = written(tmp_path / f"{name}{ending}", PACKERS[ending](content))
    assert [row.value for row in read_rows(path)] == [value]


def test_the_bytes_decide_and_not_the_name(tmp_path: Path, ending: str) -> None:
    unpacked = written(tmp_path / f"a.jsonl{ending}", CONTENT)
    packed = written(tmp_path / "b.jsonl", PACKERS[ending](CONTENT))
    assert [row.value for row in read_rows(unpacked)] == LINES
    assert [row.value for row in read_rows(packed)] == LINES


def test_a_file_that_is_cut_off(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # zstd unpacks block by block: several frames stand for the blocks of a long file.
    pack = PACKERS[ending]
    packed = pack(CONTENT)
    monkeypatch.setattr(text, "CHUNK_BYTES", 1000)
    path = written(tmp_path / f"d.jsonl{ending}", packed + packed[: len(packed) // 2])
    *good, bad = read_rows(path)
    assert [row.value for row in good[:500]] == LINES
    assert isinstance(bad.value, Problem)
    assert bad.value.code == "data.compressed"
    assert "cut off" in bad.value.found
    assert bad.value.where == f"{path}:{bad.origin.line}"


def test_a_damaged_file(tmp_path: Path, ending: str) -> None:
    packed = bytearray(PACKERS[ending](CONTENT))
    packed[len(packed) // 2] ^= 0xFF
    packed[-20] ^= 0xFF
    *_, bad = read_rows(written(tmp_path / f"d.jsonl{ending}", bytes(packed)))
    assert isinstance(bad.value, Problem)
    assert bad.value.code in ("data.compressed", "data.encoding", "data.json")


def test_nothing_but_a_beginning(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"d.jsonl{ending}", PACKERS[ending](CONTENT)[:6])
    (row,) = read_rows(path)
    assert isinstance(row.value, Problem)
    assert row.value.code == "data.compressed"


def test_packed_tables_are_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(written(tmp_path / f"d.parquet{ending}", PACKERS[ending](b"PAR1abc"))))
    assert caught.value.code == "data.format"
