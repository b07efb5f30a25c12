"""Files and directories that are whole or not there, manifests that tell, the cache."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import DiskError
from tunesmith.io import atomic
from tunesmith.io.atomic import atomic_directory, sweep_temporaries, write_atomic
from tunesmith.io.cache import cache_folder
from tunesmith.io.manifest import MANIFEST, file_sha256, find_damage, write_manifest


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


# Files


@pytest.mark.parametrize(
    ("data", "content"), [("中\n", "中\n".encode()), (b"\x00\xff", b"\x00\xff")]
)
def test_write_atomic(tmp_path: Path, data: str | bytes, content: bytes) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")
    write_atomic(path, data)
    assert path.read_bytes() == content
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(DiskError) as caught:
        write_atomic(path, "new")
    assert (caught.value.code, caught.value.where) == ("disk.write", str(path))
    assert caught.value.found == "No space left on device"
    assert isinstance(caught.value, OSError)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_content_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync folder" if is_folder else "sync file")
        sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    write_atomic(tmp_path / "f", "x")
    assert steps == ["sync file", "rename", "sync folder"]
    steps.clear()
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
    assert steps == ["sync file"] * 2 + ["sync folder", "rename", "sync folder"]


def test_a_missing_folder_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        write_atomic(tmp_path / "no" / "f", "x")
    assert caught.value.found == "No such file or directory"


# Directories


def test_atomic_directory(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "d"
    with atomic_directory(path) as folder:
        assert folder.parent == path.parent
        (folder / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert names(path.parent) == ["d"]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as folder:
        (folder / "old").write_text("1")
    with atomic_directory(path) as folder:
        (folder / "new").write_text("2")
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(type(error)), atomic_directory(path) as folder:
        (folder / "new").write_text("2")
        raise error
    assert names(path) == ["old"]
    assert names(tmp_path) == ["d"]


def test_a_full_disk_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(DiskError, match="No space left") as caught, atomic_directory(path):
        fail()
    assert (caught.value.code, caught.value.where) == ("disk.write", str(path))
    assert names(path) == ["old"]
    assert names(tmp_path) == ["d"]


def test_leftovers_of_this_process_are_no_harm(tmp_path: Path) -> None:
    left = tmp_path / f".tmp-{os.getpid()}-d"
    left.mkdir()
    (left / "half").write_text("x")
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "whole").write_text("x")
    assert names(tmp_path / "d") == ["whole"]


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1-d" / "sub").mkdir(parents=True)
    (tmp_path / ".tmp-1-f").write_text("x")
    (tmp_path / "kept").write_text("x")
    (tmp_path / "d").mkdir()
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["d", "kept"]
    sweep_temporaries(tmp_path / "not there")


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
    assert len(names(tmp_path)) == 2
    sweep_temporaries(tmp_path)
    assert names(tmp_path) == ["f"]


# Manifests


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"\x01\x02\x03")
    (folder / "sub" / "b.txt").write_text("b")
    write_manifest(folder, {"step": 7})
    return folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_directory(whole: Path) -> None:
    assert find_damage(whole) is None
    manifest = json.loads((whole / MANIFEST).read_text())
    assert (manifest["schema"], manifest["step"]) == (1, 7)
    assert manifest["files"] == {
        name: {"bytes": (whole / name).stat().st_size, "sha256": file_sha256(whole / name)}
        for name in ("a.bin", "sub/b.txt")
    }


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "f") == expected


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / MANIFEST).unlink(), "it has no manifest: the save did not finish"),
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "a.bin").write_bytes(b"\x01"), "a.bin has 1 bytes instead of 3"),
        (
            lambda f: (f / "a.bin").write_bytes(b"\x01\x02\x04"),
            "a.bin has changed since it was saved (sha256 differs)",
        ),
        (lambda f: (f / "sub" / "b.txt").write_text("bb"), "sub/b.txt has 2 bytes instead of 1"),
        (lambda f: (f / MANIFEST).write_text('{"files": {'), "its manifest cannot be read"),
        (lambda f: (f / MANIFEST).write_text(""), "its manifest cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "its manifest cannot be read"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "its manifest cannot be read"),
        (lambda f: change_manifest(f, lambda m: m.pop("files")), "its manifest cannot be read"),
    ],
)
def test_damage_is_named(whole: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(whole)
    assert find_damage(whole) == said


@pytest.mark.parametrize("files", [[], None, {"a.bin": {}}, {"a.bin": 3}])
def test_a_manifest_of_another_shape_is_damage(whole: Path, files: Any) -> None:
    change_manifest(whole, lambda manifest: manifest.update(files=files))
    assert find_damage(whole) == "its manifest cannot be read"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert find_damage(tmp_path / "none") == "it has no manifest: the save did not finish"


def test_files_that_are_not_listed_do_no_harm(whole: Path) -> None:
    (whole / "later.log").write_text("x")
    assert find_damage(whole) is None


def test_a_folder_in_the_place_of_a_file(whole: Path) -> None:
    (whole / "a.bin").unlink()
    (whole / "a.bin").mkdir()
    assert find_damage(whole) == "a.bin is missing"


# The cache and open files


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "mine"))
    assert cache_folder("stores") == tmp_path / "mine" / "stores"
    assert cache_folder("stores").is_dir()
    monkeypatch.delenv("TUNESMITH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("models") == tmp_path / "home" / ".cache" / "tunesmith" / "models"
    assert cache_folder("models").is_dir()


def test_no_open_descriptors_are_left(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    before = count()
    for _ in range(5):
        write_atomic(tmp_path / "f", "x")
        atomic.sync_directory(tmp_path)
    assert count() == before
