"""Names from elsewhere stay inside the folder; a table of those that try to leave it."""

from pathlib import Path

import pytest

from tunesmith.errors import UserError
from tunesmith.io.paths import plain_name, resolve_inside, shown

OUTSIDE = [
    "/etc/passwd",
    "//etc/passwd",
    "../secret",
    "..",
    "a/../../secret",
    "a/..",
    "./../secret",
    "a/b/../../../secret",
    "../root-of-others/file",
    "~/.ssh/id_rsa",
    "~root/.ssh/id_rsa",
    "C:/Windows/win.ini",
    "c:file",
    "\\\\server\\share",
    "link-out/file",
    "link-out",
    "link-to-sibling/file",
    "sub/link-up/secret",
    "link-to-root",
]
NO_NAMES = [
    "",
    ".",
    "./",
    "a\0b",
    "a\nb",
    "a\x1bb",
    "a\u202egpj.exe",
    "a\ud800b",
    "a\\b",
    "..\\secret",
    "... /a",
    "a/. ./b",
    "x" * 256,
    "a/" * 600,
    "字" * 86,
    "loop/file",
]
FINE = [
    ("train.json", "train.json"),
    ("a/b/c.jsonl", "a/b/c.jsonl"),
    ("./a//b.txt", "a/b.txt"),
    ("folder/", "folder"),
    ("数据/训练.jsonl", "数据/训练.jsonl"),
    ("..data", "..data"),
    ("a..b", "a..b"),
    (".hidden", ".hidden"),
    ("a b:c.txt", "a b:c.txt"),
    ("字" * 85, "字" * 85),
    ("link-in/x", "a/x"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "sub").mkdir()
    (tmp_path / "root-of-others").mkdir()
    (root / "link-out").symlink_to("/etc")
    (root / "link-to-sibling").symlink_to(tmp_path / "root-of-others")
    (root / "link-to-root").symlink_to(root)
    (root / "sub" / "link-up").symlink_to(tmp_path)
    (root / "link-in").symlink_to("a")
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_leads_outside_is_refused(root: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_inside(root, name)
    assert caught.value.code == "path.outside"


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name[:12]))
def test_what_is_no_name_is_refused(root: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_inside(root, name)
    assert caught.value.code == "path.name"
    assert "\0" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(("name", "place"), FINE)
def test_honest_names_are_kept(root: Path, name: str, place: str) -> None:
    assert resolve_inside(root, name) == root.resolve() / place


def test_a_root_that_is_a_link_itself_is_followed(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert resolve_inside(link, "a/x") == root.resolve() / "a" / "x"


def test_a_plain_name_has_no_folder() -> None:
    assert plain_name("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    for name in ("a/b", "./a", "a/", "../a"):
        with pytest.raises(UserError, match=r"path\.outside"):
            plain_name(name)


def test_names_are_shown_short_and_without_control_characters() -> None:
    assert shown("a\u202eb") == "'a\\u202eb'"
    assert len(shown("x" * 999)) == 100
