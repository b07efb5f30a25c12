"""Hidden states on disk, by what they were made from.

`rows.bin` holds the rows, `index.bin` one record for each sequence: key, place, checksums. Rows are
written before their record, and a record with a wrong checksum ends the index: after a crash at any
moment a sequence is there whole or not at all. Not covered: rows that the disk garbles between two
reads of one process; each is checked at its first.

Shape letters: T rows of several sequences, L rows of one, H hidden size.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_RECORD = struct.Struct("<16sqqI")
_CHECK = struct.Struct("<I")
_SIZE = _RECORD.size + _CHECK.size
_LEAST_FREE = 0.5
"""Share of the free disk that a cache may take at most."""


class TrunkCache:
    """One file of rows of one width and type, for one process at a time.

    Args:
        folder: where its files are; made if needed.
        width: H.
        dtype: of the rows.
        max_bytes: disk that the rows may take; what does not fit is not kept.
        note: told once when something does not fit.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        dtype: torch.dtype,
        *,
        max_bytes: int,
        note: Callable[[str], None],
    ) -> None:
        self.width, self.dtype, self.max_bytes, self.note = width, dtype, max_bytes, note
        self.row_bytes = width * dtype.itemsize
        self.is_full = False
        self._end = 0  # rows in use
        self._places: dict[bytes, tuple[int, int, int]] = {}  # first row, rows, checksum
        self._unread: set[bytes] = set()  # written by an earlier process, not checked yet
        folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._index = (_open(folder / name) for name in ("rows.bin", "index.bin"))
        weakref.finalize(self, _close, self._rows, self._index)
        fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.utime(folder)  # the least used one makes room for others
        self._load()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def used_bytes(self) -> int:
        """Disk that the rows take."""
        return self._end * self.row_bytes

    def read(self, key: bytes, out_LH: torch.Tensor) -> bool:
        """Copies a sequence's rows into a contiguous tensor on the CPU; False if it is not there.

        A damaged sequence is forgotten.
        """
        first, rows, checksum = self._places.get(key, (0, -1, 0))
        if rows != out_LH.shape[0]:
            return False
        view = _bytes_of(out_LH)
        count = os.preadv(self._rows, [view], first * self.row_bytes)
        is_whole = count == len(view)
        if key in self._unread:
            is_whole = is_whole and zlib.crc32(view) == checksum
            self._unread.discard(key)
        if not is_whole:
            del self._places[key]
        return is_whole

    def write(self, keys: Sequence[bytes], hidden_TH: torch.Tensor, lengths: Sequence[int]) -> None:
        """Keeps sequences laid end to end, those that are new and fit."""
        if hidden_TH.dtype != self.dtype or hidden_TH.shape[1] != self.width:
            raise ValueError(f"rows of {hidden_TH.dtype} x {hidden_TH.shape[1]} in this cache")
        rows_TH = hidden_TH.detach().cpu().contiguous()
        records: list[bytes] = []
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            part = rows_TH[start : start + length]
            start += length
            if key not in self._places and self._fits(length):
                records.append(self._append(key, part))
        if records:
            self._record(b"".join(records))

    def _record(self, records: bytes) -> None:
        """Adds records to the index, whole or not at all."""
        size = os.fstat(self._index).st_size
        try:
            if os.write(self._index, records) == len(records):
                return
            reason = "no room for its index"
        except OSError as error:
            reason = error.strerror or str(error)
        os.ftruncate(self._index, size)
        self.max_bytes, self.is_full = self.used_bytes, True
        self.note(f"the cache of the frozen layers cannot grow: {reason}")

    def _fits(self, rows: int) -> bool:
        if (self._end + rows) * self.row_bytes <= self.max_bytes:
            return True
        if not self.is_full:
            self.is_full = True
            self.note(
                f"the cache of the frozen layers is full at {self.used_bytes / 2**30:.1f} GiB "
                f"({len(self):,} sequences): the others are computed in every epoch"
            )
        return False

    def _append(self, key: bytes, rows_LH: torch.Tensor) -> bytes:
        view, first = _bytes_of(rows_LH), self._end
        try:
            _write_all(self._rows, view, first * self.row_bytes)
        except OSError as error:
            self.max_bytes, self.is_full = self.used_bytes, True
            self.note(f"the cache of the frozen layers cannot grow: {error.strerror}")
            return b""
        place = (first, rows_LH.shape[0], zlib.crc32(view))
        self._end += rows_LH.shape[0]
        self._places[key] = place
        record = _RECORD.pack(key, *place)
        return record + _CHECK.pack(zlib.crc32(record))

    def _load(self) -> None:
        available = os.fstat(self._rows).st_size // max(1, self.row_bytes)
        data = os.pread(self._index, os.fstat(self._index).st_size, 0)
        whole = 0
        for start in range(0, len(data) - _SIZE + 1, _SIZE):
            record = data[start : start + _RECORD.size]
            (check,) = _CHECK.unpack_from(data, start + _RECORD.size)
            key, first, rows, checksum = _RECORD.unpack(record)
            if zlib.crc32(record) != check or first + rows > available:
                break
            self._places[key] = (first, rows, checksum)
            self._end, whole = first + rows, start + _SIZE
        self._unread = set(self._places)
        os.ftruncate(self._index, whole)
        os.lseek(self._index, 0, os.SEEK_END)


def room_for(folder: Path, name: str, wanted_bytes: int, max_bytes: int) -> int:
    """Disk that the cache `name` in `folder` may take, after the least used others made room.

    Args:
        folder: of all caches.
        name: the one that will be used.
        wanted_bytes: what it is going to need.
        max_bytes: for all caches together, at most half of what is free.
    """
    own = _rows_size(folder / name)
    others = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path.name != name),
        key=lambda path: path.stat().st_mtime,
    )
    taken = sum(map(_rows_size, others))
    for path in others:
        if taken + wanted_bytes <= max_bytes:
            break
        size = _rows_size(path)
        if _remove_unused(path):
            taken -= size
    free = int(_LEAST_FREE * shutil.disk_usage(folder).free)
    return max(0, min(max_bytes - taken, own + free))


def _rows_size(folder: Path) -> int:
    file = folder / "rows.bin"
    return file.stat().st_size if file.is_file() else 0


def _remove_unused(folder: Path) -> bool:
    descriptor = _open(folder / "index.bin")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _bytes_of(rows_LH: torch.Tensor) -> memoryview:
    array: Any = rows_LH.detach().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
