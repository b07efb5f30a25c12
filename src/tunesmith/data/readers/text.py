"""Text files in known encodings, decoded line by line so that a bad byte has a line number."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from tunesmith.errors import Problem

CHUNK_BYTES = 1 << 20


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str | Problem]]:
    """Yields (line number, text or what is wrong with it); a leading byte order mark is skipped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                yield number, encoding_problem(f"{path}:{number}", line, encoding, error)
                return


def read_chunks(path: Path, encoding: str) -> Iterator[str | Problem]:
    """Yields the file's text in pieces of about CHUNK_BYTES, or one problem and no more."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with path.open("rb") as file:
        raw = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8)
        while True:
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at = line + bytes(error.object[: error.start]).count(b"\n")
                yield encoding_problem(f"{path}:{at}", bytes(error.object), encoding, error)
                return
            if text:
                yield text
            if not raw:
                return
            line += raw.count(b"\n")
            raw = file.read(CHUNK_BYTES)


def encoding_problem(where: str, raw: bytes, encoding: str, error: UnicodeDecodeError) -> Problem:
    """Names the bad byte and, where the bytes look like Chinese text, the encoding to ask for."""
    found = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}, which is no {encoding}"
    expected = f"{encoding} text"
    if _looks_like_gb18030(raw[max(0, error.start - 2) :]):
        found += "; it looks like GBK/GB18030"
        expected += ", or `encoding: gb18030` for this file in the recipe"
    return Problem(where, "data.encoding", found, expected)


def _looks_like_gb18030(raw: bytes) -> bool:
    """Whether most of the text decodes to common Chinese characters."""
    text = raw[:4096].decode("gb18030", errors="replace")
    wide = [char for char in text if ord(char) > 0x7F]
    common = sum("\u4e00" <= char <= "\u9fff" or char in "，。？！：；“”（）、" for char in wide)
    return bool(wide) and common / len(wide) > 0.8
