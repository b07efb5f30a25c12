"""Archives come out whole and inside their folder, or not at all."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import DiskError, UserError
from tunesmith.io import archive as archive_module
from tunesmith.io.archive import MAX_ENTRIES, unpack

FILES = {"a.txt": b"alpha", "sub/b.txt": b"beta", "sub/数据.txt": b""}
LIMIT = 64 << 20


def make_zip(entries: dict[str, bytes] | list[tuple[Any, bytes]], **how: Any) -> bytes:
    target = io.BytesIO()
    pairs = entries.items() if isinstance(entries, dict) else entries
    with zipfile.ZipFile(target, "w", **{"compression": zipfile.ZIP_DEFLATED, **how}) as packed:
        for name, content in pairs:
            packed.writestr(name, content)
    return target.getvalue()


def make_tar(
    entries: dict[str, bytes], *members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT
) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as packed:
        for member in members:
            packed.addfile(member)
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return target.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def refusal(content: bytes, folder: Path, limit_bytes: int = LIMIT) -> str:
    """The error's code; nothing may have appeared."""
    source = folder / "source.bin"
    source.write_bytes(content)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        unpack(source, folder / "out", limit_bytes=limit_bytes)
    assert sorted(folder.rglob("*")) == before
    return caught.value.code


@pytest.mark.parametrize(
    "content",
    [
        make_zip(FILES),
        make_zip(FILES, compression=zipfile.ZIP_STORED),
        make_tar(FILES),
        make_tar(FILES, form=tarfile.GNU_FORMAT),
        gzip.compress(make_tar(FILES)),
        gzip.compress(make_tar(FILES, special("sub", tarfile.DIRTYPE))),
        make_zip([("sub/", b""), *FILES.items()]),
    ],
    ids=["zip", "stored", "pax", "gnu", "tar.gz", "folder in tar", "folder in zip"],
)
def test_honest_archives_come_out_as_they_went_in(content: bytes, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(content)
    out.mkdir()
    (out / "old.txt").touch()
    unpack(source, out, limit_bytes=LIMIT)
    found = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert found == FILES
    assert all(f.stat().st_mode & 0o111 == 0 for f in out.rglob("*") if f.is_file())


def test_long_names_and_many_files_are_fine(tmp_path: Path) -> None:
    name = "d" * 120 + "/" + "f" * 200
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        source = tmp_path / "source"
        source.write_bytes(make_tar({name: b"x"}, form=form))
        unpack(source, tmp_path / "out", limit_bytes=LIMIT)
        assert (tmp_path / "out" / name).read_bytes() == b"x"


EVIL_NAMES = ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\..\\evil", "C:/evil", "e\nvil"]


@pytest.mark.parametrize("name", EVIL_NAMES)
@pytest.mark.parametrize("make", [make_zip, make_tar, lambda e: gzip.compress(make_tar(e))])
def test_names_that_lead_elsewhere(make: Callable[..., bytes], name: str, tmp_path: Path) -> None:
    assert refusal(make({"good.txt": b"x", name: b"evil"}), tmp_path) == "archive.name"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice(tmp_path: Path) -> None:
    twice = [("a", b"1"), ("./a", b"2")]
    assert refusal(make_zip(twice), tmp_path) == "archive.name"
    assert refusal(make_zip({"a": b"1", "a/b": b"2"}), tmp_path) == "archive.name"
    assert refusal(make_zip([("a/b", b"1"), ("a", b"2")]), tmp_path) == "archive.name"


@pytest.mark.parametrize(
    "member",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.LNKTYPE, "../../secret"),
        special("pipe", tarfile.FIFOTYPE),
        special("disk", tarfile.BLKTYPE),
        special("terminal", tarfile.CHRTYPE),
        special("odd", b"V"),
    ],
    ids=lambda member: member.name,
)
def test_links_and_devices(member: tarfile.TarInfo, tmp_path: Path) -> None:
    assert refusal(make_tar(FILES, member), tmp_path) == "archive.link"


def test_a_link_in_a_zip(tmp_path: Path) -> None:
    content = make_zip([(zip_link("link"), b"/etc"), ("link/passwd", b"x")])
    assert refusal(content, tmp_path) == "archive.link"


BOMB = bytes(40 << 20)


@pytest.mark.parametrize(
    "content",
    [make_zip({"zeros": BOMB}), gzip.compress(make_tar({"zeros": BOMB}), 9)],
    ids=["zip", "tar.gz"],
)
def test_bombs_stop_at_the_ratio(content: bytes, tmp_path: Path) -> None:
    assert len(content) < 100_000
    assert refusal(content, tmp_path) == "archive.too-large"


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    content = bytearray(make_zip({"zeros": bytes(4 << 20)}))
    at = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, at + 24, 10)  # the size said to come out
    assert refusal(bytes(content), tmp_path) in ("archive.broken", "archive.too-large")


def test_overlapping_entries_share_one_ratio(tmp_path: Path) -> None:
    """The same packed bytes named 200 times by the directory, as in Fifield's bombs."""
    piece = make_zip({"a": bytes(900_000)})
    at = piece.index(b"PK\x01\x02")
    local, end = piece[:at], piece.index(b"PK\x05\x06")
    entry = bytearray(piece[at:end])
    directory = b""
    for index in range(200):
        entry[-1:] = bytes([33 + index % 90])
        directory += bytes(entry)
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 200, 200, len(directory), len(local), 0)
    assert refusal(local + directory + tail, tmp_path) in ("archive.too-large", "archive.broken")


def test_the_callers_limit(tmp_path: Path) -> None:
    content = make_zip({"a": b"1234567890", "b": b"1234567890"})
    assert refusal(content, tmp_path, 19) == "archive.too-large"
    source = tmp_path / "source"
    source.write_bytes(content)
    unpack(source, tmp_path / "out", limit_bytes=20)


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ENTRIES == 10_000
    monkeypatch.setattr(archive_module, "MAX_ENTRIES", 50)
    names = {f"f{index}": b"" for index in range(51)}
    for make in (make_zip, make_tar):
        assert refusal(make(names), tmp_path) == "archive.too-large"


def test_a_tar_name_of_gigabytes(tmp_path: Path) -> None:
    member = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    member.size = 8 << 30
    content = member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    assert refusal(content, tmp_path) == "archive.broken"
    assert refusal(gzip.compress(content), tmp_path) == "archive.broken"


def test_places_that_a_header_may_not_name(tmp_path: Path) -> None:
    """A zip's directory before the file's begin, and a tar reader that would unpack .gz anew."""
    content = bytearray(make_zip(FILES))
    at = content.index(b"PK\x05\x06")
    struct.pack_into("<I", content, at + 16, 1 << 31)  # where the directory is said to begin
    assert refusal(bytes(content), tmp_path) == "archive.broken"
    room = archive_module._Room(tmp_path / "source.bin", LIMIT)
    for can_go_back, offset in ((True, -1), (False, 2)):
        with (tmp_path / "source.bin").open("rb") as raw:
            file = archive_module._Forward(raw, room, can_go_back=can_go_back)
            assert file.seek(5) == 5
            with pytest.raises(ValueError, match="points"):
                file.seek(offset)


def test_headers_in_headers_without_end(tmp_path: Path) -> None:
    member = special("pax", tarfile.XGLTYPE)
    content = member.tobuf(tarfile.PAX_FORMAT) * 3000
    assert refusal(content, tmp_path) in ("archive.broken", "archive.too-large")


def test_forms_that_are_not_taken(tmp_path: Path) -> None:
    assert refusal(b"just text", tmp_path) == "archive.format"
    assert refusal(b"", tmp_path) == "archive.format"
    assert refusal(b"Rar!\x1a\x07", tmp_path) == "archive.format"
    assert refusal(make_zip(FILES, compression=zipfile.ZIP_LZMA), tmp_path) == "archive.format"
    secret = bytearray(make_zip({"a": b"x"}))
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        secret[secret.index(sign) + offset] |= 1
    assert refusal(bytes(secret), tmp_path) == "archive.format"


def test_damage_is_said_plainly(tmp_path: Path) -> None:
    whole = gzip.compress(make_tar({"a": bytes(range(256)) * 400}))
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 0xFF
    for content in (
        whole[: len(whole) // 2],
        bytes(broken),
        make_zip(FILES)[:-30],
        gzip.compress(b"no tar" * 200),
        make_tar({"a": bytes(5000)})[:1024],
    ):
        assert refusal(content, tmp_path) == "archive.broken"


def test_mutated_archives_never_surprise(tmp_path: Path) -> None:
    """40 archives with a few bytes changed: unpacked inside the folder, or refused by name."""
    dice = random.Random(0)
    originals = [make_zip(FILES), make_tar(FILES), gzip.compress(make_tar(FILES))]
    source, out = tmp_path / "in" / "source", tmp_path / "in" / "out"
    source.parent.mkdir()
    for _ in range(40):
        content = bytearray(dice.choice(originals))
        for _ in range(dice.randint(1, 6)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        source.write_bytes(content)
        try:
            unpack(source, out, limit_bytes=LIMIT)
        except UserError as error:
            assert error.code.startswith("archive.")
        assert {item.name for item in source.parent.iterdir()} <= {"source", "out"}
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(make_zip(FILES))
    with pytest.raises(DiskError):
        unpack(source, source / "below a file", limit_bytes=LIMIT)
