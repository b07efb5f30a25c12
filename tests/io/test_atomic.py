"""Whole or not at all: files and directories under faults of the disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import CheckpointError, DiskError
from tunesmith.io.atomic import atomic_directory, sweep_temporaries, sync_directory, write_atomic


def names_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# Files


@pytest.mark.parametrize("data", ["中文\n", b"\x00\xff\r\n", ""])
def test_a_file_gets_exactly_its_content(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "f"
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names_in(tmp_path) == ["f"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, "a longer text")
    write_atomic(path, "short")
    assert path.read_text() == "short"


def test_the_old_file_stays_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DiskError) as caught:
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["f"]
    error = caught.value
    assert (error.code, error.where) == ("disk.full", str(path))
    assert error.found == "No space left on device"
    assert error.exit_code == 6
    assert isinstance(error.__cause__, OSError)


def test_the_content_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename before the sync could leave an empty file after a power cut."""
    path = tmp_path / "f"
    seen: list[bool] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(path.exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomic(path, "x")
    assert seen == [False, True]  # the file before, its directory after


def test_a_missing_folder_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        write_atomic(tmp_path / "no" / "f", "x")
    assert caught.value.found == "No such file or directory"


def test_a_place_under_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError) as caught:
        write_atomic(tmp_path / "file" / "f", "x")
    assert caught.value.found == "Not a directory"


# Directories


def fill(path: Path, text: str) -> None:
    with atomic_directory(path) as folder:
        (folder / "a").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text(text * 2)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "d"
    with atomic_directory(target) as folder:
        assert folder.parent == target.parent
        (folder / "a").write_text("x")
        assert not target.exists()
    assert names_in(target) == ["a"]
    assert names_in(target.parent) == ["d"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "d", "old")
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "c").write_text("new")
    assert names_in(tmp_path / "d") == ["c"]
    assert names_in(tmp_path) == ["d"]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_an_error_in_the_block_leaves_the_old_directory(
    tmp_path: Path, error: BaseException
) -> None:
    fill(tmp_path / "d", "old")
    with pytest.raises(type(error)), atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("half")
        raise error
    assert (tmp_path / "d" / "sub" / "b").read_text() == "oldold"
    assert names_in(tmp_path) == ["d"]


def test_a_full_disk_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "d", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(DiskError) as caught:
            fill(tmp_path / "d", "new")
    assert (caught.value.code, caught.value.where) == ("disk.full", str(tmp_path / "d"))
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert names_in(tmp_path) == ["d"]


def test_an_error_of_the_disk_in_the_block_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, atomic_directory(tmp_path / "d"):
        full_disk()
    assert caught.value.found == "No space left on device"
    assert names_in(tmp_path) == []


def test_our_own_errors_pass_as_they_are(tmp_path: Path) -> None:
    """CheckpointError is an OSError too, but says more than `disk.write` would."""
    error = CheckpointError("checkpoint.x", "here", found="that", expected="this")
    with pytest.raises(CheckpointError), atomic_directory(tmp_path / "d"):
        raise error
    assert names_in(tmp_path) == []


def test_the_old_directory_comes_back_when_the_new_one_cannot_be_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "d"
    fill(target, "old")
    real = Path.replace
    calls: list[Path] = []

    def replace(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            full_disk()
        return real(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(DiskError):
        fill(target, "new")
    assert len(calls) >= 2
    assert (target / "a").read_text() == "old"


def test_every_file_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "d"
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").resolve().name
        synced.append((name, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    fill(target, "x")
    assert {("a", False), ("b", False)} <= set(synced)
    assert synced[-1] == (tmp_path.name, True)


# Leftovers


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-step").mkdir()
    (tmp_path / ".tmp-1-step" / "half").touch()
    (tmp_path / ".tmp-1-file").touch()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "kept.tmp").touch()
    sweep_temporaries(tmp_path)
    assert names_in(tmp_path) == ["kept.tmp", "step-1"]


def test_leftovers_do_not_get_into_a_new_directory(tmp_path: Path) -> None:
    stale = tmp_path / f".tmp-{os.getpid()}-d"
    stale.mkdir()
    (stale / "half").touch()
    fill(tmp_path / "d", "x")
    assert names_in(tmp_path / "d") == ["a", "sub"]


def test_sync_directory_gives_its_descriptor_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sync_directory(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kill_before_the_rename_leaves_the_old(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from tunesmith.io import atomic\n"
        "real, path, stop = Path.replace, Path(sys.argv[1]), int(sys.argv[2])\n"
        "count = 0\n"
        "def replace(self, target):\n"
        "    global count; count += 1\n"
        "    if count == stop: os._exit(9)\n"
        "    return real(self, target)\n"
        "Path.replace = replace\n"
        "atomic.write_atomic(path, 'new')\n"
    )
    path = tmp_path / "f"
    path.write_text("old")
    ended = subprocess.run([sys.executable, "-c", script, str(path), "1"], check=False)
    assert ended.returncode == 9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    sweep_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
