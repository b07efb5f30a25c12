"""Which encoding a text file is in, and what a byte that does not fit it suggests."""

from __future__ import annotations

import codecs

from tunesmith.data.readers.compressed import BrokenArchiveError, read_pieces
from tunesmith.data.readers.data_file import DataFile, Meter
from tunesmith.errors import DataError, Problem

HEAD_BYTES = 4096

# The marks of UTF-32 come first: that of UTF-16-LE is the beginning of one of them.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

CHINESE_MARKS = "，。？！：；“”（）、《》"


def check_encoding(file: DataFile) -> None:
    """Refuses names that Python does not know.

    Raises:
        DataError: an unknown name, or a codec that is not for text (`data.encoding`).
    """
    try:
        if file.encoding != "auto":
            "".encode(file.encoding)
    except LookupError:
        found = f"the encoding {file.encoding!r}"
        expected = "auto, or a name that Python knows, e.g. utf-8, utf-16, gb18030"
        raise DataError([Problem(str(file.path), "data.encoding", found, expected)]) from None


def encoding_of(file: DataFile) -> str | Problem:
    """The encoding named, else that of the byte order mark, else UTF-8."""
    if file.encoding != "auto":
        return file.encoding
    head = head_of(file)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    order = _utf16_order(head)
    if order is None:
        return "utf-8"
    return Problem(
        f"{file.path}:1",
        "data.encoding",
        f"a zero byte at offset {head.index(0)}; it looks like UTF-16 without a byte order mark",
        f"utf-8 text, or `encoding: utf-16-{order}` for this file in the recipe",
    )


def head_of(file: DataFile) -> bytes:
    """The first bytes of the unpacked file; empty if it cannot be unpacked."""
    try:
        return next(read_pieces(file.path, HEAD_BYTES, Meter()), b"")
    except BrokenArchiveError:
        return b""


def _utf16_order(head: bytes) -> str | None:
    """'le' or 'be' if every zero byte stands where UTF-16 has the upper half of ASCII."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    # Text of UTF-8 may hold a zero byte or two; ASCII text in UTF-16 is one half zeros.
    enough = len(head) // 3 if _is_utf8(head) else 2
    if even + odd < enough or bool(even) == bool(odd):
        return None
    return "be" if even else "le"


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def bad_byte_problem(where: str, error: UnicodeDecodeError, column: int, offset: int) -> Problem:
    """Names the byte and, where the bytes look like Chinese text, the encoding to ask for."""
    encoding = error.encoding
    byte = error.object[error.start]
    found = f"byte 0x{byte:02x} at column {column}, offset {offset}, which is no {encoding}"
    expected = f"{encoding} text"
    if looks_like_gb18030(error):
        found += "; it looks like GBK/GB18030"
        expected += ", or `encoding: gb18030` for this file in the recipe"
    return Problem(where, "data.encoding", found, expected)


def looks_like_gb18030(error: UnicodeDecodeError) -> bool:
    """Whether the text from the bad byte on is common Chinese characters, and not in UTF-8."""
    raw = bytes(error.object[max(0, error.start - 2) : error.start + HEAD_BYTES])
    # One bad byte in Chinese UTF-8 would pass the test below: its bytes are characters of GBK too.
    as_utf8 = raw.decode("utf-8", errors="replace")
    num_wide = sum(char > "\x7f" for char in as_utf8)
    if num_wide > 2 * as_utf8.count("\ufffd"):
        return False
    wide = [char for char in raw.decode("gb18030", errors="replace") if char > "\x7f"]
    num_common = sum("\u4e00" <= char <= "\u9fff" or char in CHINESE_MARKS for char in wide)
    return bool(wide) and num_common / len(wide) > 0.8
