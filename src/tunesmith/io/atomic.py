"""Files and directories that appear whole or not at all.

Covered: a crash of the process or the machine at any moment leaves the old content or the new.
Not covered: network file systems whose rename is not atomic.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from tunesmith.errors import DiskError, TunesmithError
from tunesmith.io.fault import fault


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces a file's content in one step.

    Raises:
        DiskError: the file cannot be written (`disk.write`).
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    content = data.encode() if isinstance(data, str) else data
    try:
        fault("save.write", path)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            fault("save.fsync", temporary)
            os.fsync(file.fileno())
        fault("save.rename", temporary)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


@contextmanager
def atomic_text(path: Path) -> Generator[TextIO]:
    """Yields a UTF-8 text file that becomes `path` when the block ends without an error.

    Raises:
        DiskError: it cannot be written (`disk.write`).
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """Yields a temporary directory that becomes `path` when the block ends without an error.

    An existing `path` is replaced. Files are synced to disk before the rename.

    Raises:
        DiskError: something in it cannot be written (`disk.write`).
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        fault("save.open", path)
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync_file(file)
        sync_directory(temporary)
        fault("save.rename", temporary)
        if path.exists():
            # Two renames, so that a reader sees the old one, nothing, or the new one, never a mix.
            old = path.with_name(f".tmp-{os.getpid()}-old-{path.name}")
            path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                old.replace(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(path)
        sync_directory(path.parent)
    except TunesmithError:
        raise
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep_temporaries(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`."""
    for item in folder.glob(".tmp-*"):
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Makes renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    fault("save.fsync", path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


ROOM = 1.2
"""Free space asked for, as a multiple of what will be written."""


def require_space(folder: Path, num_bytes: int) -> None:
    """Makes sure that there is room before something is begun.

    Args:
        folder: an existing one on the disk in question.
        num_bytes: that will be written.

    Raises:
        DiskError: there is less than ROOM times as much (`disk.full`).
    """
    free = shutil.disk_usage(folder).free
    if free < ROOM * num_bytes:
        raise DiskError(
            "disk.full",
            str(folder),
            found=f"{format_bytes(free)} free",
            expected=f"at least {format_bytes(ROOM * num_bytes)}",
            try_="free some space, or choose another `output`",
        )


def format_bytes(num_bytes: float) -> str:
    """A size as people write it."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


def disk_error(path: Path, error: OSError | SafetensorError) -> DiskError:
    """Our error for what the system or safetensors says of a write that failed."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells the system's number in its text alone.
    is_full = getattr(error, "errno", None) in numbers or any(
        f"os error {number})" in str(error) for number in numbers
    )
    return DiskError(
        "disk.full" if is_full else "disk.write",
        str(path),
        found=getattr(error, "strerror", None) or str(error),
        expected="room for it" if is_full else "a place that can be written",
        try_="free some space, or choose another `output`",
    )
