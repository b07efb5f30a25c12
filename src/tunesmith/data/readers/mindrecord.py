"""MindRecord: the binary rows of MindSpore, read without it.

A shard is an 8-byte length, a JSON header, and pages of equal size. A page is a run of rows, each
with its length in front. A row's scalar fields are one msgpack map in a RAW page; its arrays and
bytes fields lie in a BLOB page. Rows stand in the same order in both, so the pages are simply read
side by side: the SQLite index (`.db`) is not needed and never opened.

Not covered: encrypted files, which are refused, and version 2.0, which is read by the rules of
version 3.0 as MindSpore does, but was never seen.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TypeAlias, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError, Problem
from tunesmith.types import Json

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 128 << 20
"""MindSpore writes no larger header; a larger length means that the file is something else."""

ENCRYPTED_TRAILER = b"ENCRYPT"
VERSIONS = ("2.0", "3.0")

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Length: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=1 << 48)]
Scalar: TypeAlias = str | int | float | None
ScalarRow = msgspec.msgpack.Decoder(dict[str, Scalar])


class Field(msgspec.Struct, frozen=True):
    """One column; only arrays have a shape, where -1 stands for any length."""

    type: Literal["bytes", "string", "int32", "int64", "float32", "float64"]
    shape: tuple[Length, ...] | None = None


class Schema(msgspec.Struct, frozen=True):
    """The columns of a data set; `blob_fields` names those in BLOB pages, in their order there."""

    fields: dict[str, Field] = msgspec.field(name="schema")
    blob_fields: list[str] = []


class Page(msgspec.Struct, frozen=True):
    """Where a run of rows lies, and how many bytes of the page it fills."""

    page_id: Count
    page_type: Literal["RAW_DATA", "BLOB_DATA"]
    page_type_id: Count
    page_size: Count


class Header(msgspec.Struct, frozen=True):
    """What a shard says about itself and the set it belongs to."""

    header_size: Count
    page_size: Count
    version: str
    shard_id: Count
    shard_addresses: list[str]
    schemas: list[Schema] = msgspec.field(name="schema")
    pages: list[Page] | None = msgspec.field(name="page", default=None)

    @property
    def schema(self) -> Schema:
        """The one schema there is."""
        return self.schemas[0]

    def page_start(self, page: Page) -> int:
        """The page's first byte in the file."""
        return self.header_size + self.page_size * page.page_id

    def pages_of(self, kind: str) -> list[Page]:
        """The RAW or the BLOB pages in the order of their rows."""
        pages = [page for page in self.pages or [] if page.page_type == kind]
        return sorted(pages, key=lambda page: page.page_type_id)


def read_mindrecord(path: Path) -> Iterator[tuple[int, dict[str, Json] | Problem]]:
    """Yields (number, row or problem) of one shard; numbers count from 1.

    Arrays become lists of their shape, and bytes become hexadecimal text.

    Raises:
        DataError: the file is missing (`data.missing-file`), may not be read (`data.unreadable`),
            or is no MindRecord file, encrypted, cut off or damaged so that the rows after that
            place cannot be found (`data.mindrecord`).
    """
    _check_exists(path)
    with path.open("rb") as raw_file, path.open("rb") as blob_file:
        header = _read_header(raw_file, path)
        raw_rows = _rows_of_pages(raw_file, path, header, "RAW_DATA")
        blob_rows = _rows_of_pages(blob_file, path, header, "BLOB_DATA")
        for number, (raw, blob) in enumerate(zip_longest(raw_rows, blob_rows), 1):
            if raw is None or blob is None:
                kind = "RAW" if raw is None else "BLOB"
                found = f"no row {number} in the {kind} pages, while the other pages have one"
                raise _damaged(path, found, "as many rows in RAW pages as in BLOB pages")
            yield number, _decode_row(raw, blob, header.schema, f"{path}:{number}")


def mindrecord_shards(path: Path) -> list[Path]:
    """All files, in order, of the data set that `path` belongs to.

    `path` is a single file, any one shard, or the name that the shards have in common
    (`x.mindrecord` of `x.mindrecord0`, `x.mindrecord1`).

    Raises:
        DataError: a file is missing (`data.missing-file`), or a header cannot be read or belongs
            to another set (`data.mindrecord`).
    """
    member = path if path.exists() else _any_shard(path)
    header = _header_of(member)
    shards = [member.with_name(name) for name in _shard_names(member.name, header)]
    for number, shard in enumerate(shards):
        if not shard.exists():
            raise DataError(
                [
                    Problem(
                        str(shard),
                        "data.missing-file",
                        "no such file",
                        f"shard {number + 1} of {len(shards)} that {member.name} names",
                    )
                ],
                try_="put all shards of the set in one folder",
            )
        _check_member(shard, number, len(shards))
    return shards


# Files


def _check_exists(path: Path) -> None:
    if path.is_file():
        if not os.access(path, os.R_OK):
            found = "a file that may not be read"
            raise DataError([Problem(str(path), "data.unreadable", found, "read permission")])
        return
    found = "a folder" if path.is_dir() else "no such file"
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    raise DataError(
        [Problem(str(path), "data.missing-file", found, "a MindRecord file")],
        try_=f"did you mean {path.parent / near[0]}?" if near and found != "a folder" else None,
    )


def _any_shard(path: Path) -> Path:
    """A shard of the set whose shards are called `path` and a number, or `path` itself."""
    if path.parent.is_dir():
        shard = re.compile(re.escape(path.name) + r"\d+")
        found = sorted(item for item in path.parent.iterdir() if shard.fullmatch(item.name))
        if found:
            return found[0]
    return path


def _shard_names(name: str, header: Header) -> list[str]:
    """File names of the whole set, also when the files were renamed after they were written."""
    names = [Path(address).name for address in header.shard_addresses]
    if len(names) == 1 or name in names:
        return [name] if len(names) == 1 else names
    suffixes = [re.sub(r"^.*?(\d*)$", r"\1", each) for each in names]
    own = suffixes[header.shard_id]
    stem = name.removesuffix(own) if name.endswith(own) else name
    return [stem + suffix for suffix in suffixes]


def _check_member(shard: Path, number: int, count: int) -> None:
    header = _header_of(shard)
    if (header.shard_id, len(header.shard_addresses)) != (number, count):
        found = f"shard {header.shard_id + 1} of {len(header.shard_addresses)} of another set"
        raise _damaged(shard, found, f"shard {number + 1} of {count}")


def _damaged(path: Path, found: str, expected: str, try_: str | None = None) -> DataError:
    return DataError([Problem(str(path), "data.mindrecord", found, expected)], try_=try_)


# The header


def _header_of(path: Path) -> Header:
    _check_exists(path)
    with path.open("rb") as file:
        return _read_header(file, path)


def _read_header(file: BinaryIO, path: Path) -> Header:
    size = path.stat().st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        found = f"{size} bytes whose header should have {length} bytes"
        raise _not_mindrecord(file, path, found)
    try:
        header = msgspec.json.decode(file.read(length), type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_mindrecord(file, path, f"a header that cannot be read: {error}") from error
    _check_header(path, header, length)
    _check_pages(path, header, size)
    return header


def _not_mindrecord(file: BinaryIO, path: Path, found: str) -> DataError:
    """The reason why there is no header: encryption, or anything else."""
    file.seek(max(0, path.stat().st_size - len(ENCRYPTED_TRAILER)))
    if file.read() == ENCRYPTED_TRAILER:
        try_ = "decrypt it with MindSpore, or export the rows as JSON lines"
        return _damaged(path, "an encrypted MindRecord file", "one without encryption", try_)
    try_ = "write the file again: it is cut off, damaged, or of another kind"
    return _damaged(path, found, "a MindRecord file with its JSON header", try_)


def _check_header(path: Path, header: Header, length: int) -> None:
    if header.version not in VERSIONS:
        raise _damaged(path, f"MindRecord version {header.version!r}", " or ".join(VERSIONS))
    if len(header.schemas) != 1:
        raise _damaged(path, f"{len(header.schemas)} schemas", "one schema")
    if header.shard_id >= len(header.shard_addresses):
        found = f"shard number {header.shard_id} of {len(header.shard_addresses)}"
        raise _damaged(path, found, "a number below the number of shards")
    if any(not Path(each).name or "\0" in each for each in header.shard_addresses):
        raise _damaged(path, f"the shards {header.shard_addresses}", "a file name for each")
    if header.header_size < LENGTH_BYTES + length or not header.page_size:
        found = f"a header of {header.header_size} bytes and pages of {header.page_size} bytes"
        raise _damaged(path, found, f"more than the {LENGTH_BYTES + length} bytes in use")
    unknown = [name for name in header.schema.blob_fields if name not in header.schema.fields]
    if unknown:
        raise _damaged(path, f"the field {unknown[0]!r} without a type", "a type for each field")


def _check_pages(path: Path, header: Header, size: int) -> None:
    for page in header.pages or []:
        if page.page_size > header.page_size:
            found = f"page {page.page_id} with {page.page_size} bytes"
            raise _damaged(path, found, f"at most {header.page_size} bytes a page")
        end = header.page_start(page) + page.page_size
        if end > size:
            try_ = "copy or download the file again: it is cut off"
            raise _damaged(path, f"{size} bytes", f"at least {end} bytes", try_)


# Pages


def _rows_of_pages(file: BinaryIO, path: Path, header: Header, kind: str) -> Iterator[bytes]:
    for page in header.pages_of(kind):
        start = header.page_start(page)
        file.seek(start)
        position = 0
        while position < page.page_size:
            length = int.from_bytes(_read(file, LENGTH_BYTES, path), "little")
            position += LENGTH_BYTES + length
            if position > page.page_size:
                found = f"a row of {length} bytes at byte {start + position - length}"
                raise _damaged(path, found, "a row that ends inside its page")
            yield _read(file, length, path)


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _damaged(path, "a file that became shorter", "a file that stays as it is")
    return data


# Rows


def _decode_row(raw: bytes, blob: bytes, schema: Schema, where: str) -> dict[str, Json] | Problem:
    """The row with its fields in the order of the schema."""
    values: dict[str, Json] = {}
    try:
        scalars = ScalarRow.decode(raw)
        blobs = _split_blob(blob, schema.blob_fields)
        for name, field in schema.fields.items():
            part = blobs.get(name)
            values[name] = _scalar(field, scalars, name) if part is None else _array(field, part)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Problem(where, "data.mindrecord", f"a damaged row: {error}", "a msgpack map")
    except ValueError as error:
        return Problem(where, "data.mindrecord", f"a damaged row: {error}", _described(schema))
    return values


def _described(schema: Schema) -> str:
    kinds = [
        f"{name} ({field.type}{' array' if field.shape is not None else ''})"
        for name, field in schema.fields.items()
    ]
    return f"the fields {', '.join(kinds)}"


def _scalar(field: Field, scalars: dict[str, Scalar], name: str) -> Json:
    if name not in scalars:
        raise ValueError(f"no field {name!r}")
    value = scalars[name]
    kind = {"s": str, "i": int, "f": (int, float)}.get(field.type[0], ())
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} in the field {name!r}")
    return float(value) if field.type[0] == "f" else value


def _split_blob(blob: bytes, names: list[str]) -> dict[str, bytes]:
    """The bytes of each field; a lone field has no length in front."""
    if len(names) <= 1:
        return dict.fromkeys(names, blob)
    parts: dict[str, bytes] = {}
    position = 0
    for name in names:
        start = position + LENGTH_BYTES
        end = start + int.from_bytes(blob[position:start], "big")
        if end > len(blob):
            raise ValueError(f"the field {name!r} reaches past the row's {len(blob)} bytes")
        parts[name] = blob[start:end]
        position = end
    if position < len(blob):
        raise ValueError(f"{len(blob) - position} bytes behind the last field")
    return parts


def _array(field: Field, data: bytes) -> Json:
    if field.type == "bytes":
        return data.hex()
    if field.type == "string":
        return data.decode()
    flat: NDArray[np.generic]
    if field.type.startswith("int"):
        flat = _unpack_integers(data)
    else:
        flat = np.frombuffer(data, dtype="<f4" if field.type == "float32" else "<f8")
    shape = (-1,) if field.shape is None else field.shape
    return cast("Json", flat.reshape(shape).tolist())


def _unpack_integers(data: bytes) -> NDArray[np.int64]:
    """Integers of 1, 2, 4 or 8 bytes, whose widths stand in front as two bits each."""
    count = int.from_bytes(data[:4], "big")
    start = 4 + -(-count // 4)
    if start > len(data):
        raise ValueError(f"{count} integers in {len(data)} bytes")
    codes = np.frombuffer(data, dtype=np.uint8, count=start - 4, offset=4)
    codes = (codes[:, None] >> np.array([6, 4, 2, 0], dtype=np.uint8) & 3).reshape(-1)[:count]
    ends = start + np.cumsum(1 << codes.astype(np.int64))
    if count and int(ends[-1]) != len(data):
        raise ValueError(f"{count} integers in {len(data)} bytes instead of {int(ends[-1])}")
    everything = np.frombuffer(data, dtype=np.uint8)
    values = np.zeros(count, dtype=np.int64)
    for code in range(4):
        width = 1 << code
        chosen = codes == code
        places = ends[chosen, None] + np.arange(-width, 0)
        values[chosen] = everything[places].view(f"<i{width}").reshape(-1)
    return values
