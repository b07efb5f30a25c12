"""Headers of weight files that lie are refused, cheaply, and what passes is read the same."""

import json
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunesmith.errors import ModelError
from tunesmith.io.headers import (
    BLOCKS,
    DTYPE_BITS,
    MAX_TENSORS,
    check_gguf,
    check_safetensors,
    check_weights,
)

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def pack(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(check: Callable[[Path], None], file: Path, content: bytes) -> str:
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        check(file)
    return caught.value.found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_what_safetensors_writes_passes(file: Path) -> None:
    tensors = {
        "a": np.ones((3, 4), np.float32),
        "空": np.zeros((0, 7), np.int64),
        "scalar": np.array(1.5, np.float16),
        **{f"layers.{i}": np.full((i,), i, np.uint8) for i in range(50)},
    }
    for metadata in (None, {"format": "pt", "note": 'a "quoted" } brace', "empty": ""}):
        save_file(tensors, file, metadata)
        check_weights([file])
    save_file({}, file)
    check_safetensors(file)


@pytest.mark.parametrize(
    "header",
    [
        {"a": F32, "__metadata__": {}},
        b' {"a":1}',
        b'{ "a" : {"data_offsets":[0,16],\n"shape":[4], "dtype":"F32" } }   ',
        b"{}",
    ],
)
def test_other_ways_to_write_json(file: Path, header: Any) -> None:
    data = b"" if header == b"{}" else bytes(16)
    file.write_bytes(pack(header, data))
    if header == b' {"a":1}':
        with pytest.raises(ModelError):
            check_safetensors(file)
    else:
        check_safetensors(file)


LIES: dict[str, bytes] = {
    "empty": b"",
    "short": b"1234567",
    "a terabyte of header": struct.pack("<Q", 1 << 40) + b"{}",
    "2^64": b"\xff" * 8 + b"{}",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "no JSON": pack(b"hello"),
    "an array": pack(b"[]", b""),
    "a pickle": b"\x80\x04\x95" + bytes(40),
    "a cut header": pack(b'{"a":{"dtype":"F32"'),
    "a comma too many": pack(b'{"a":' + json.dumps(F32).encode() + b",}"),
    "no comma": pack(b'{"a":%s"b":%s}' % ((json.dumps(F32).encode(),) * 2)),
    "a name twice": pack(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)),
    "something behind": pack(json.dumps({"a": F32}).encode() + b"x"),
    "an unknown type": pack({"a": {**F32, "dtype": "Q4"}}),
    "a type that is a list": pack({"a": {**F32, "dtype": []}}),
    "a negative size": pack({"a": {**F32, "shape": [-2, -2]}}),
    "a size that overflows": pack({"a": {**F32, "shape": [1 << 62, 4]}}),
    "a size past 64 bits": pack({"a": {**F32, "shape": [1 << 70]}}),
    "a fraction": pack({"a": {**F32, "shape": [2.0, 2]}}),
    "true": pack({"a": {**F32, "shape": [True, 4]}}),
    "a deep shape": pack(b'{"a":{"shape":' + b"[" * 3000 + b"}}"),
    "a huge number": pack(b'{"a":{"shape":[' + b"9" * 3990 + b"]}}"),
    "shape and bytes differ": pack({"a": {**F32, "shape": [3]}}),
    "offsets turned round": pack({"a": {**F32, "data_offsets": [16, 0]}}),
    "no list of offsets": pack({"a": {**F32, "data_offsets": 16}}),
    "a shape of 65 sizes": pack({"a": {**F32, "shape": [1] * 65}}),
    "one offset": pack({"a": {**F32, "data_offsets": [16]}}),
    "beyond the file": pack({"a": {**F32, "data_offsets": [100, 116]}}),
    "a gap": pack({"a": {**F32, "data_offsets": [4, 20]}}, bytes(20)),
    "an overlap": pack({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}, bytes(24)),
    "the same bytes twice": pack({"a": F32, "b": F32}),
    "bytes left over": pack({"a": F32}, bytes(17)),
    "bytes missing": pack({"a": F32}, bytes(15)),
    "a key too many": pack({"a": {**F32, "path": "/etc/passwd"}}),
    "a key missing": pack({"a": {"dtype": "F32", "shape": [4]}}),
    "a tensor that is a number": pack({"a": 1}),
    "metadata with numbers": pack({"a": F32, "__metadata__": {"n": 1}}),
    "metadata with objects": pack({"a": F32, "__metadata__": {"n": {}}}),
    "metadata as text": pack({"a": F32, "__metadata__": "x"}),
    "metadata without end": pack(b'{"__metadata__":{"a":"b"'),
    "a name without end": pack(b'{"aaaaaaaaaa'),
    "a name that is no text": pack(b'{"a\\q":' + json.dumps(F32).encode() + b"}"),
    "a long name": pack({"a" * 2000: F32}),
    "a long entry": pack({"a": {**F32, "pad": "x" * 5000}}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_safetensors(file: Path, lie: str) -> None:
    assert len(refusal(check_safetensors, file, LIES[lie])) < 300


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.gguf"):
        with pytest.raises(ModelError, match="No such file"):
            check_weights([tmp_path / name])


def test_types_are_those_of_the_libraries() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert {int(kind): size for kind, size in GGML_QUANT_SIZES.items()} == BLOCKS
    assert DTYPE_BITS["BF16"] == 16 and len(DTYPE_BITS) == 22


# GGUF

Q8_0, TEXT, ARRAY, UINT8, UINT32 = 8, 8, 9, 0, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def gguf(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = bytes(64),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


WORDS = pair("words", ARRAY, struct.pack("<IQ", TEXT, 2) + text("a") + text("über"))
NUMBERS = pair("numbers", ARRAY, struct.pack("<IQ", UINT8, 3) + b"123")
NAME = pair("general.name", TEXT, text("tiny"))
ALIGNED_64 = pair("general.alignment", UINT32, struct.pack("<I", 64))

GOOD_GGUF = gguf(
    [NAME, WORDS, NUMBERS], [tensor("a", [4, 2]), tensor("b", [32], Q8_0, 32)], bytes(66)
)

GGUF_LIES: dict[str, bytes] = {
    "empty": b"",
    "another magic": b"GGML" + GOOD_GGUF[4:],
    "the magic alone": b"GGUF",
    "version 1": gguf([], [], version=1),
    "the other byte order": gguf([], [], version=3 << 24),
    "too many tensors": gguf([], [], counts=(1 << 60, 0)),
    "too many tensors for their size": gguf([], [], counts=(MAX_TENSORS + 1, 0)),
    "too many keys": gguf([], [], counts=(0, 1 << 63)),
    "more tensors than there are": gguf([NAME], [tensor("a", [4])], counts=(2, 1)),
    "a long key": gguf([struct.pack("<Q", 1 << 40) + b"k"], []),
    "a key past the end": gguf([struct.pack("<Q", 900) + b"k"], []),
    "a long text": gguf([text("k") + struct.pack("<IQ", TEXT, 1 << 62)], []),
    "an array of 2^60": gguf([pair("k", ARRAY, struct.pack("<IQ", UINT8, 1 << 60))], []),
    "an array of 2^60 texts": gguf([pair("k", ARRAY, struct.pack("<IQ", TEXT, 1 << 60))], []),
    "an array of arrays": gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []),
    "an unknown value": gguf([pair("k", 99, b"12345678")], []),
    "a key twice": gguf([NAME, NAME], []),
    "alignment 0": gguf([pair("general.alignment", UINT32, bytes(4))], []),
    "alignment 24": gguf([pair("general.alignment", UINT32, struct.pack("<I", 24))], []),
    "alignment 2^31": gguf([pair("general.alignment", UINT32, struct.pack("<I", 1 << 31))], []),
    "alignment as text": gguf([pair("general.alignment", TEXT, text("32"))], []),
    "a tensor twice": gguf([], [tensor("a", [8]), tensor("a", [8], 0, 32)]),
    "a long tensor name": gguf([], [tensor("a" * 1025, [8])]),
    "2^31 dimensions": gguf([], [text("a") + struct.pack("<I", 1 << 31)]),
    "a size of 0": gguf([], [tensor("a", [0, 4])]),
    "sizes that overflow": gguf([], [tensor("a", [1 << 32, 1 << 32])]),
    "a size of 2^63": gguf([], [tensor("a", [1 << 63])]),
    "an unknown type": gguf([], [tensor("a", [8], 4)]),
    "half a block": gguf([], [tensor("a", [16], Q8_0)]),
    "an odd place": gguf([], [tensor("a", [8], 0, 8)]),
    "a place past the end": gguf([], [tensor("a", [8], 0, 1 << 40)]),
    "the end past the end": gguf([], [tensor("a", [17])]),
    "an overlap": gguf([], [tensor("a", [16]), tensor("b", [8], 0, 32)]),
    "no data at all": gguf([NAME], [tensor("a", [8])], b"")[:-1],
}


def test_good_gguf_files_pass(file: Path) -> None:
    for content in (
        GOOD_GGUF,
        gguf([ALIGNED_64], [tensor("a", [8])], alignment=64),
        gguf([], [], b"", version=2),
        gguf([], [tensor("scalar", [])]),
    ):
        target = file.with_suffix(".gguf")
        target.write_bytes(content)
        check_weights([target])


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_lies_of_gguf(file: Path, lie: str) -> None:
    assert len(refusal(check_gguf, file.with_suffix(".gguf"), GGUF_LIES[lie])) < 300


# Fuzzing


def mutate(content: bytes, head_bytes: int, dice: random.Random) -> bytes:
    """A few changes in the header: bits, bytes, 64-bit numbers, pieces lost, doubled or cut off."""
    result = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(head_bytes, len(result)) or 1)
        match dice.randrange(6):
            case 0:
                result[at] ^= 1 << dice.randrange(8)
            case 1:
                result[at] = dice.choice(b'0123456789[]{},:"-eE\\ \xff\x00')
            case 2:
                number = dice.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(content)])
                result[at : at + 8] = struct.pack("<Q", number)
            case 3:
                del result[at : at + dice.randint(1, 20)]
            case 4:
                result[at:at] = result[at : at + dice.randint(1, 20)]
            case _:
                del result[dice.randrange(len(result)) :]
        if not result:
            break
    return bytes(result)


def safetensors_cases(count: int, seed: int) -> Iterator[bytes]:
    dice = random.Random(seed)
    header = {
        "a": F32,
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
        "__metadata__": {"format": "pt"},
    }
    content = pack(header, bytes(range(19)))
    return (mutate(content, len(content) - 19, dice) for _ in range(count))


def gguf_cases(count: int, seed: int) -> Iterator[bytes]:
    dice = random.Random(seed)
    return (mutate(GOOD_GGUF, len(GOOD_GGUF) - 66, dice) for _ in range(count))


def read_safetensors(file: Path) -> dict[str, Any]:
    with safe_open(file, "np") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def test_safetensors_headers_with_changes(file: Path) -> None:
    """100 of them; `tests/faults` has the thousand."""
    for content in safetensors_cases(100, seed=1):
        file.write_bytes(content)
        try:
            check_safetensors(file)
        except ModelError:
            continue
        try:
            tensors = read_safetensors(file)
        except SafetensorError:
            continue
        assert sum(t.nbytes for t in tensors.values()) <= len(content)


def test_gguf_headers_with_changes(file: Path) -> None:
    passed = 0
    for content in gguf_cases(100, seed=1):
        file.write_bytes(content)
        try:
            check_gguf(file)
        except ModelError:
            continue
        passed += 1
    assert passed < 50


@pytest.mark.parametrize(
    "content",
    [
        b"[" * (8 << 20),
        b'{"a":' + b"[" * (8 << 20),
        b'{"__metadata__":{' + b'"":{},' * (1 << 20),
        b'{"__metadata__":{' + b'"k":"",' * (1 << 20),
        b'{"' + b"\\" * (8 << 20),
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 150_000,
    ],
    ids=lambda content: ascii(content[:20]),
)
def test_memory_and_time_stay_small(file: Path, content: bytes) -> None:
    """8 MB of header made to blow up: a few times its size at most."""
    file.write_bytes(struct.pack("<Q", len(content)) + content)
    tracemalloc.start()
    with pytest.raises(ModelError):
        check_safetensors(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


def test_many_names_stay_small(file: Path) -> None:
    entry = b'"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    content = b"{" + b"".join(entry % index for index in range(5_000)) + b'"end":1}'
    file.write_bytes(pack(content, b""))
    tracemalloc.start()
    with pytest.raises(ModelError, match="end"):
        check_safetensors(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_500_000  # so 200,000 take less than 100 MB
