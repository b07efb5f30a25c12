"""The structure of weight files, checked before any native code parses them.

Only headers are read. A file that passes can be opened without surprise: its sizes agree with each
other and with the file, and nothing in it asks for memory that the file does not fill. At most some
50 MB are held here, whatever the header says.

Not covered: whether the weights are any good, and quantized values inside a GGUF block.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NoReturn, cast

from tunesmith.errors import ModelError

MAX_HEADER_BYTES = 32 << 20
"""Largest safetensors header. The format allows 100 MB; real ones have some 110 bytes a tensor."""

MAX_TENSORS = 200_000
"""Most tensors in one file; those of the largest models have a tenth of it."""

MAX_NOTES = 10_000
"""Most texts in the metadata of a safetensors file."""

MAX_ENTRY_BYTES = 4096
MAX_NAME_BYTES = 1024

_TYPES_OF_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "C64 F64 I64 U64",
}
DTYPE_BITS = {name: bits for bits, names in _TYPES_OF_BITS.items() for name in names.split()}

# A JSON text in quotes; possessive, so that a missing quote costs one look at each byte.
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_KEY = re.compile(rb"[ \t\r\n]*+(" + _TEXT + rb")[ \t\r\n]*+:[ \t\r\n]*+")
_STRING = re.compile(_TEXT + rb"[ \t\r\n]*+")
_NEXT = re.compile(rb"[ \t\r\n]*+([,}])")


def check_weights(files: Iterable[Path]) -> None:
    """Checks safetensors and GGUF files by their headers.

    Raises:
        ModelError: one of them is not what it says (`model.bad-safetensors`, `model.bad-gguf`).
    """
    for file in files:
        if file.suffix == ".gguf":
            check_gguf(file)
        else:
            check_safetensors(file)


# safetensors: 8 bytes of header length, a JSON object of tensors, their bytes without gaps


def check_safetensors(file: Path) -> None:
    """Checks that each tensor of a safetensors file has its bytes in it, and nothing else is there.

    Raises:
        ModelError: it is damaged or made up (`model.bad-safetensors`).
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            length = stream.read(8)
            if len(length) < 8:
                _refuse_safetensors(file, f"a file of {file_bytes} bytes")
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                _refuse_safetensors(
                    file, f"a header of {header_bytes:,} bytes in a file of {file_bytes:,}"
                )
            header = stream.read(header_bytes)
    except OSError as error:
        _refuse_safetensors(file, error.strerror or str(error))
    _check_spans(file, _read_spans(file, header), file_bytes - 8 - header_bytes)


def _read_spans(file: Path, header: bytes) -> list[tuple[int, int]]:
    """Begin and end of each tensor in the data; entries are decoded one at a time."""
    spans: list[tuple[int, int]] = []
    names: set[bytes] = set()
    at, has_more = _open_object(file, header)
    while has_more:
        key = _KEY.match(header, at)
        if key is None:
            _refuse_safetensors(file, f"a header that is no JSON object (byte {8 + at})")
        name = key[1]
        if name in names or len(names) == MAX_TENSORS or len(name) > MAX_NAME_BYTES:
            _refuse_safetensors(file, f"too many or too long names, or one twice: {name[:60]!r}")
        names.add(name)
        if name == b'"__metadata__"':
            at = _skip_metadata(file, header, key.end())
        else:
            at = header.find(b"}", key.end(), key.end() + MAX_ENTRY_BYTES) + 1
            spans.append(_read_span(file, name, header[key.end() : at]))
        at, has_more = _after_value(file, header, at)
    rest = header[at:]
    if rest.strip(b" "):
        _refuse_safetensors(file, f"{rest[:20]!r} behind the header's JSON")
    return spans


def _open_object(file: Path, header: bytes) -> tuple[int, bool]:
    """Where the first entry begins, and whether there is one."""
    if not header.startswith(b"{"):
        _refuse_safetensors(file, f"a header that starts with {header[:8]!r}")
    end = _NEXT.match(header, 1)
    return (end.end(), False) if end is not None and end[1] == b"}" else (1, True)


def _after_value(file: Path, header: bytes, at: int) -> tuple[int, bool]:
    """Where the next entry begins, and whether there is one."""
    end = _NEXT.match(header, at)
    if end is None:
        _refuse_safetensors(file, f"a header that is no JSON object (byte {8 + at})")
    return end.end(), end[1] == b","


def _skip_metadata(file: Path, header: bytes, at: int) -> int:
    """Where the object of texts ends that starts at a place."""
    if header[at : at + 1] == b"{":
        end = _NEXT.match(header, at + 1)
        if end is not None and end[1] == b"}":
            return end.end()
        at += 1
        for _ in range(MAX_NOTES):
            key = _KEY.match(header, at)
            text = _STRING.match(header, key.end()) if key else None
            end = _NEXT.match(header, text.end()) if text else None
            if end is None:
                break
            at = end.end()
            if end[1] == b"}":
                return at
    _refuse_safetensors(file, "__metadata__ that is no object of texts, or of too many")


def _read_span(file: Path, name: bytes, entry: bytes) -> tuple[int, int]:
    """Begin and end of one tensor, if its shape fills them exactly."""
    try:
        json.loads(name)
        values: dict[str, Any] = json.loads(entry)
        if set(values) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the keys {', '.join(values)}")
        shape: list[int] = values["shape"]
        begin, end = _counts(values["data_offsets"])
        bits = DTYPE_BITS[values["dtype"]] * prod(_counts(shape))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _refuse_safetensors(file, f"the tensor {name[:60]!r} with {str(error)[:80]}")
    if begin > end or bits != 8 * (end - begin):
        _refuse_safetensors(
            file, f"{values['dtype']} {shape} for {name[:60]!r} in {end - begin:,} bytes"
        )
    return begin, end


def _counts(values: object) -> list[int]:
    """The values, if they are a short list of whole numbers that fit 63 bits."""
    if not isinstance(values, list) or len(cast("list[object]", values)) > 64:
        raise ValueError("no short list of numbers")
    numbers = cast("list[object]", values)
    for number in numbers:
        # True is an int, too.
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"{str(number)[:30]} for a whole number")
    return cast("list[int]", numbers)


def _check_spans(file: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            _refuse_safetensors(file, f"a gap or an overlap at byte {begin:,} of the data")
        at = end
    if at != data_bytes:
        _refuse_safetensors(file, f"{data_bytes:,} bytes of data for tensors of {at:,}")


def _refuse_safetensors(file: Path, found: str) -> NoReturn:
    raise ModelError(
        "model.bad-safetensors",
        str(file),
        found=found,
        expected="a whole safetensors file",
        try_="fetch or save it again",
    )


# GGUF: magic, version, counts; key-value pairs; tensor descriptions; the tensors, aligned

GGUF_VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY, UINT32 = 8, 9, 4

# Weights of a block -> number of ggml's type and bytes of one block.
_TYPES_OF_BLOCKS = {
    1: ((0, 4), (1, 2), (24, 1), (25, 2), (26, 4), (27, 8), (28, 8), (30, 2)),
    32: ((2, 18), (3, 20), (6, 22), (7, 24), (8, 34), (9, 40), (20, 18), (39, 17)),
    64: ((40, 36),),
    128: ((41, 18),),
    256: (
        *((10, 84), (11, 110), (12, 144), (13, 176), (14, 210), (15, 292), (16, 66), (17, 74)),
        *((18, 98), (19, 50), (21, 110), (22, 82), (23, 136), (29, 56), (34, 54), (35, 66)),
    ),
}
BLOCKS = {
    kind: (weights, size) for weights, kinds in _TYPES_OF_BLOCKS.items() for kind, size in kinds
}
"""Number of ggml's type -> weights and bytes of one block."""


def check_gguf(file: Path) -> None:
    """Checks that all that a GGUF file describes is in it.

    Raises:
        ModelError: it is damaged or made up (`model.bad-gguf`).
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            if magic != b"GGUF":
                _refuse_gguf(file, f"a file that starts with {magic!r}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Gguf(content).check()
    except OSError as error:
        _refuse_gguf(file, error.strerror or str(error))
    except (struct.error, _LyingError) as error:
        _refuse_gguf(
            file, str(error) if isinstance(error, _LyingError) else "a file that is cut off"
        )


class _LyingError(Exception):
    """What a header says cannot be true."""


class _Gguf:
    """A walk through a GGUF file's header."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._size = len(content)
        self._at = 4
        self._alignment = 32

    def check(self) -> None:
        """Walks through it.

        Raises:
            _LyingError: it does not fit the file.
            struct.error: the file ends within it.
        """
        version, num_tensors, num_pairs = self._take("<IQQ")
        if version not in GGUF_VERSIONS:
            raise _LyingError(f"version {version}")
        self._expect_room(num_tensors, 24, "tensors")
        self._expect_room(num_pairs, 13, "keys")
        keys: set[bytes] = set()
        for _ in range(num_pairs):
            key = self._name("key")
            if key in keys:
                raise _LyingError(f"the key {key[:60]!r} twice")
            keys.add(key)
            self._skip_value(key)
        self._check_tensors([self._tensor() for _ in range(num_tensors)])

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._content, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _expect_room(self, count: int, each_bytes: int, what: str) -> None:
        if count > MAX_TENSORS and what != "values":
            raise _LyingError(f"{count:,} {what}")
        if count * each_bytes > self._size - self._at:
            raise _LyingError(f"{count:,} {what} in a file of {self._size:,} bytes")

    def _name(self, what: str) -> bytes:
        (length,) = self._take("<Q")
        if length > MAX_NAME_BYTES:
            raise _LyingError(f"a {what} of {length:,} bytes")
        self._expect_room(length, 1, "values")
        start, self._at = self._at, self._at + length
        return self._content[start : self._at]

    def _skip_value(self, key: bytes) -> None:
        (kind,) = self._take("<I")
        if key == b"general.alignment":
            (alignment,) = self._take("<I") if kind == UINT32 else (0,)
            if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
                raise _LyingError(f"an alignment of {alignment}")
            self._alignment = alignment
        elif kind == TEXT:
            self._skip_texts(1)
        elif kind == ARRAY:
            item_kind, count = self._take("<IQ")
            if item_kind == TEXT:
                self._skip_texts(count)
            else:
                self._skip_scalars(item_kind, count)
        else:
            self._skip_scalars(kind, 1)

    def _skip_scalars(self, kind: int, count: int) -> None:
        if kind not in SCALAR_BYTES:
            raise _LyingError(f"a value of the unknown type {kind}")
        self._expect_room(count, SCALAR_BYTES[kind], "values")
        self._at += count * SCALAR_BYTES[kind]

    def _skip_texts(self, count: int) -> None:
        self._expect_room(count, 8, "values")
        # A vocabulary has 250,000 of them: 0.1 s.
        at, size, read, content = (
            self._at,
            self._size,
            struct.Struct("<Q").unpack_from,
            self._content,
        )
        for _ in range(count):
            (length,) = read(content, at)
            at += 8 + length
            if at > size:
                raise _LyingError(f"a text of {length:,} bytes in a file of {size:,}")
        self._at = at

    def _tensor(self) -> tuple[int, int, bytes]:
        """Begin and end of one tensor in the data, and its name."""
        name = self._name("tensor's name")
        (num_dimensions,) = self._take("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise _LyingError(f"{num_dimensions} dimensions of {name[:60]!r}")
        shape = self._take(f"<{num_dimensions}Q")
        kind, begin = self._take("<IQ")
        if kind not in BLOCKS:
            raise _LyingError(f"the unknown type {kind} of {name[:60]!r}")
        block_weights, block_bytes = BLOCKS[kind]
        row = shape[0] if shape else 1
        if 0 in shape or row % block_weights or prod(shape) >= 1 << 63:
            raise _LyingError(f"the shape {list(shape)} of {name[:60]!r}")
        return begin, begin + prod(shape) // block_weights * block_bytes, name

    def _check_tensors(self, tensors: list[tuple[int, int, bytes]]) -> None:
        if len({name for _, _, name in tensors}) != len(tensors):
            raise _LyingError("two tensors of one name")
        data_bytes = self._size - -(-self._at // self._alignment) * self._alignment
        at = 0
        for begin, end, name in sorted(tensors):
            if begin % self._alignment or begin < at or end > data_bytes:
                raise _LyingError(f"{name[:60]!r} at {begin:,} to {end:,} of {data_bytes:,} bytes")
            at = end


def _refuse_gguf(file: Path, found: str) -> NoReturn:
    raise ModelError(
        "model.bad-gguf",
        str(file),
        found=found,
        expected="a whole GGUF file, version 2 or 3",
        try_="fetch it again",
    )
