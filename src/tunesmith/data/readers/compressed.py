"""The bytes of a file, unpacked on the way if it is a .gz or .zst."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from tunesmith.data.readers.data_file import Meter

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

ZSTD_PIECE_BYTES = 4096
"""What is unpacked at once: zstd packs up to 128 KiB of one byte in 4, so 4 KiB are 128 MiB."""


class BrokenArchiveError(Exception):
    """The packed file is damaged or cut off from some place on."""


def read_pieces(path: Path, size: int, meter: Meter) -> Iterator[bytes]:
    """Yields the unpacked content in pieces of about `size` bytes.

    The first bytes decide whether it is packed, not the name: browsers unpack .gz files and keep
    their names.

    Raises:
        BrokenArchiveError: after the last piece that could be unpacked.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP_MAGIC):
            pieces = _gzip_pieces(file, size)
        elif magic == ZSTD_MAGIC:
            pieces = _gathered(_zstd_pieces(file), size)
        else:
            pieces = iter(lambda: file.read(size), b"")
        seen = 0
        for piece in pieces:
            at = file.tell()
            meter.bytes_read += at - seen
            seen = at
            yield piece


def _gzip_pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        try:
            while piece := unpacked.read(size):
                yield piece
        except EOFError:
            raise BrokenArchiveError("a gzip file that is cut off") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BrokenArchiveError(f"a damaged gzip file ({error})") from None


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    # `stream_reader` would be shorter and says nothing when the file is cut off.
    unpacker = None
    rest = file.read(ZSTD_PIECE_BYTES)
    while rest:
        unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
        try:
            yield unpacker.decompress(rest)
        except zstandard.ZstdError as error:
            raise BrokenArchiveError(f"a damaged zstd file ({error})") from None
        rest = b""
        if unpacker.eof:
            rest, unpacker = unpacker.unused_data, None
        rest = rest or file.read(ZSTD_PIECE_BYTES)
    if unpacker:
        raise BrokenArchiveError("a zstd file that is cut off")


def _gathered(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Joins small pieces; what came before an error is passed on before it."""
    parts: list[bytes] = []
    length = 0
    try:
        for piece in pieces:
            parts.append(piece)
            length += len(piece)
            if length >= size:
                yield b"".join(parts)
                parts, length = [], 0
    except BrokenArchiveError:
        yield b"".join(parts)
        raise
    if length:
        yield b"".join(parts)
