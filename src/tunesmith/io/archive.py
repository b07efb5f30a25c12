"""Unpacks .zip, .tar and .tar.gz files from strangers; nothing else here unpacks anything.

Names go down only, nothing but plain files and folders is made, and every byte is counted as it is
written, whatever the headers say. The folder appears whole or not at all. Permissions, owners and
times are not taken over.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from tunesmith.errors import UserError
from tunesmith.io.atomic import atomic_directory
from tunesmith.io.paths import resolve_inside, shown

MAX_ENTRIES = 10_000
MAX_RATIO = 100
"""Unpacked bytes for each packed one; honest texts come to 30, deflate can do 1,032."""

FREE_BYTES = 1 << 20
"""What may be unpacked at any ratio: small archives of empty forms are no bombs."""

MAX_READ_BYTES = 16 << 20
"""Largest single read that a header may ask for: a zip's directory, a tar's long names."""

PIECE_BYTES = 1 << 16

_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
    # What both libraries raise for made-up headers.
    *(ValueError, OverflowError, IndexError, RecursionError, NotImplementedError, RuntimeError),
)


class _Room:
    """What may still be unpacked of one archive."""

    def __init__(self, archive: Path, limit_bytes: int) -> None:
        self.where = str(archive)
        self.ratio_bytes = max(FREE_BYTES, MAX_RATIO * archive.stat().st_size)
        self._bytes_left = min(limit_bytes, self.ratio_bytes)
        self._entries_left = MAX_ENTRIES

    def take_entry(self) -> None:
        """Counts a file or folder."""
        self._entries_left -= 1
        if self._entries_left < 0:
            self.refuse(f"more than {MAX_ENTRIES:,} entries")

    def take_bytes(self, count: int) -> None:
        """Counts bytes that are about to be written."""
        self._bytes_left -= count
        if self._bytes_left < 0:
            self.refuse("more bytes than it may unpack to")

    def refuse(self, found: str) -> NoReturn:
        """Says that there is too much of something."""
        raise UserError(
            "archive.too-large",
            self.where,
            found=found,
            expected=f"at most {MAX_RATIO} bytes for each packed one, and what the caller allows",
            try_="unpack it yourself and name the folder",
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A plain file or folder in an archive; a folder has no content."""

    name: str
    content: IO[bytes] | None


def unpack(archive: Path, folder: Path, *, limit_bytes: int) -> None:
    """Unpacks an archive into a folder, which is replaced if it exists.

    Args:
        archive: a .zip, .tar or .tar.gz file, told by its content.
        folder: where to.
        limit_bytes: what may be unpacked at most.

    Raises:
        UserError: it is none of these (`archive.format`), damaged (`archive.broken`), has a name
            that leads elsewhere or comes twice (`archive.name`), a link or device
            (`archive.link`), or too much in it (`archive.too-large`).
        DiskError: the folder cannot be written (`disk.write`).
    """
    room = _Room(archive, limit_bytes)
    with atomic_directory(folder) as temporary, archive.open("rb") as file:
        try:
            for entry in _entries(file, room):
                _write(entry, temporary, room)
        except UserError:
            raise
        except _BROKEN as error:
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                "archive.broken",
                str(archive),
                found=f"a damaged archive ({reason[:100]})",
                expected="a whole one",
                try_="fetch or pack it again",
            ) from error


def _entries(file: IO[bytes], room: _Room) -> Iterator[_Entry]:
    head = file.read(512)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_entries(file, room)
    if head.startswith(b"\x1f\x8b"):
        return _tar_entries(gzip.GzipFile(fileobj=file), room)
    if head[257:262] == b"ustar":
        return _tar_entries(file, room)
    raise _format_error(room, f"a file that starts with {head[:4]!r}")


def _zip_entries(file: IO[bytes], room: _Room) -> Iterator[_Entry]:
    with zipfile.ZipFile(_Forward(file, room, can_go_back=True)) as archive:
        for info in archive.infolist():
            room.take_entry()
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _link_error(room, info.filename)
            if info.flag_bits & 1:
                raise _format_error(room, f"{shown(info.filename)}, which needs a password")
            # bzip2 and LZMA let a few bytes ask for gigabytes of memory.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _format_error(room, f"{shown(info.filename)}, packed in a rare way")
            if info.is_dir():
                yield _Entry(info.filename, None)
            else:
                with archive.open(info) as content:
                    yield _Entry(info.filename, content)


def _tar_entries(file: Any, room: _Room) -> Iterator[_Entry]:
    with tarfile.open(fileobj=_Forward(file, room), mode="r:") as archive:
        for member in archive:
            room.take_entry()
            is_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if not is_file and not member.isdir():
                raise _link_error(room, member.name)
            yield _Entry(member.name, archive.extractfile(member) if is_file else None)


class _Forward(io.BufferedIOBase):
    """A file whose reader gets no more than an honest header asks for.

    Args:
        file: what is read.
        room: bounds what is read in all, so that gigabytes of padding are not skipped for ever.
        can_go_back: whether to allow seeking backwards, which would unpack a .gz anew each time.
    """

    def __init__(self, file: IO[bytes], room: _Room, *, can_go_back: bool = False) -> None:
        self._file = file
        self._room = room
        self._can_go_back = can_go_back
        self._bytes_read = 0

    def tell(self) -> int:
        """The place of the next byte."""
        return self._file.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        """Some bytes; all the rest only if it is short."""
        if size is None or size < 0:
            size = MAX_READ_BYTES
        if size > MAX_READ_BYTES:
            raise ValueError(f"a header that asks for {size:,} bytes")
        content = self._file.read(size)
        self._bytes_read += len(content)
        if self._bytes_read > self._room.ratio_bytes:
            self._room.refuse(f"more than {MAX_RATIO} bytes for each packed one")
        return content

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Goes to a place; on the way forward, all is read."""
        if self._can_go_back:
            try:
                return self._file.seek(offset, whence)
            except OSError as error:
                raise ValueError("a header that points nowhere") from error
        if whence or offset < self.tell():
            raise ValueError("a header that points back")
        while (left := offset - self.tell()) > 0 and self.read(min(left, PIECE_BYTES)):
            pass
        return self.tell()


def _write(entry: _Entry, folder: Path, room: _Room) -> None:
    try:
        path = resolve_inside(folder, entry.name.removesuffix("/"))
    except UserError as error:
        raise _name_error(room, entry.name, error.found) from None
    try:
        (path if entry.content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if entry.content is None:
            return
        with path.open("xb") as file:
            while piece := entry.content.read(PIECE_BYTES):
                room.take_bytes(len(piece))
                file.write(piece)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise _name_error(room, entry.name, "a name that comes twice") from None


def _name_error(room: _Room, name: str, found: str) -> UserError:
    return UserError(
        "archive.name",
        f"{room.where}:{shown(name)}",
        found=found,
        expected="names of files below the archive's own folder, each once",
    )


def _link_error(room: _Room, name: str) -> UserError:
    return UserError(
        "archive.link",
        f"{room.where}:{shown(name)}",
        found="a link, a device or a sparse file",
        expected="plain files and folders",
        try_="pack it again with the files that the links name (tar --dereference, zip)",
    )


def _format_error(room: _Room, found: str) -> UserError:
    return UserError(
        "archive.format",
        room.where,
        found=found,
        expected="a .zip (stored or deflated), .tar or .tar.gz file without a password",
    )
