"""One process per run directory, also after a kill."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunesmith.errors import LockError
from tunesmith.io.lock import directory_lock

HOLD = """
import sys
from pathlib import Path
from tunesmith.io.lock import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A child that holds the lock until its standard input closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            yield child
        finally:
            child.kill()


def test_a_second_process_is_refused_with_the_pid(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        with pytest.raises(LockError) as caught, directory_lock(tmp_path):
            pass
        error = caught.value
        assert (error.code, error.where) == ("lock.held", str(tmp_path))
        assert error.found == f"process {child.pid} at work in it"
        assert error.exit_code == 7
        # Being refused leaves the lock as it was: the next one learns the same.
        with pytest.raises(LockError, match=f"process {child.pid} "), directory_lock(tmp_path):
            pass


def test_a_kill_frees_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert (tmp_path / ".lock").read_text() == str(child.pid)
        with directory_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_end_of_the_block_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), directory_lock(tmp_path):
            raise KeyError
    with holder(tmp_path) as child:
        assert (tmp_path / ".lock").read_text() == str(child.pid)


def test_one_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with directory_lock(tmp_path):
        with pytest.raises(LockError, match=f"process {os.getpid()} "), directory_lock(tmp_path):
            pass
        with directory_lock(_folder(tmp_path / "other")):
            assert (tmp_path / "other" / ".lock").exists()


def test_a_holder_that_has_not_signed_yet_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with directory_lock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(LockError, match="process unknown"), directory_lock(tmp_path):
            pass


def test_the_refusal_can_be_sent_to_another_process(tmp_path: Path) -> None:
    with directory_lock(tmp_path), pytest.raises(LockError) as caught, directory_lock(tmp_path):
        pass
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, LockError)
    assert str(copy) == str(caught.value)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
