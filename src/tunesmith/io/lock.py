"""One process per run directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import LockError


@contextmanager
def directory_lock(folder: Path) -> Generator[None]:
    """Holds `folder` for this process; the system frees it even after a kill.

    Raises:
        LockError: another process holds it (`lock.held`), with its process id.
    """
    path = folder / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockError(
                "lock.held",
                str(folder),
                found=f"process {file.read().strip() or 'unknown'} at work in it",
                expected="a run directory of one's own",
                try_="wait for it, stop it, or choose another `output`",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
