"""Each kind of damage to a saved directory is found and named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.io.manifest import MANIFEST, SCHEMA, file_sha256, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(b"0123456789")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "状态.json").write_text("{}", encoding="utf-8")
    write_manifest(tmp_path, {"step": 7})
    return tmp_path


def edit_manifest(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    path = folder / MANIFEST
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edit(tree)), encoding="utf-8")


def test_a_manifest_lists_every_file(folder: Path) -> None:
    tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert (tree["schema"], tree["step"]) == (SCHEMA, 7)
    assert tree["files"] == {
        "sub/状态.json": {"bytes": 2, "sha256": file_sha256(folder / "sub" / "状态.json")},
        "weights.bin": {
            "bytes": 10,
            "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
        },
    }


def test_a_whole_directory_has_no_damage(folder: Path) -> None:
    assert find_damage(folder) is None


def test_a_second_manifest_does_not_list_the_first(folder: Path) -> None:
    write_manifest(folder)
    assert find_damage(folder) is None


def test_a_file_added_later_does_no_damage(folder: Path) -> None:
    (folder / "notes.txt").touch()
    assert find_damage(folder) is None


def test_no_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    assert find_damage(folder) == "it has no manifest: the save did not finish"
    assert find_damage(tmp_path / "nowhere") == "it has no manifest: the save did not finish"


@pytest.mark.parametrize("content", [b"", b'{"files": {', b"\xff\xfe", b"[]", b"null", b"{}", b"3"])
def test_an_unreadable_manifest(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder) == "its manifest cannot be read"


def test_a_missing_file(folder: Path) -> None:
    (folder / "sub" / "状态.json").unlink()
    assert find_damage(folder) == "sub/状态.json is missing"


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()
    assert find_damage(folder) == "weights.bin is missing"


@pytest.mark.parametrize("size", [0, 9, 11])
def test_another_size(folder: Path, size: int) -> None:
    (folder / "weights.bin").write_bytes(b"0123456789A"[:size])
    assert find_damage(folder) == f"weights.bin has {size} bytes instead of 10"


def test_one_changed_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[4] ^= 1
    (folder / "weights.bin").write_bytes(data)
    assert find_damage(folder) == "weights.bin has changed since it was saved (sha256 differs)"


def test_another_sha256_in_the_manifest(folder: Path) -> None:
    def edit(tree: dict[str, object]) -> object:
        files = tree["files"]
        assert isinstance(files, dict)
        files["weights.bin"]["sha256"] = "0" * 64
        return tree

    edit_manifest(folder, edit)
    damage = find_damage(folder)
    assert damage == "weights.bin has changed since it was saved (sha256 differs)"


@pytest.mark.parametrize(
    "files", [[], None, {"weights.bin": {}}, {"weights.bin": {"bytes": 10}}, {"weights.bin": 3}]
)
def test_a_manifest_of_another_shape(folder: Path, files: object) -> None:
    edit_manifest(folder, lambda tree: {**tree, "files": files})
    assert find_damage(folder) == "its manifest cannot be read"


def test_any_changed_bit_of_a_manifest_is_no_crash(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    start = whole.index(b'"files"')
    for at in range(start, len(whole)):
        data = bytearray(whole)
        data[at] ^= 4
        path.write_bytes(data)
        damage = find_damage(folder)
        assert damage is not None, (at, bytes(data[start:]))
