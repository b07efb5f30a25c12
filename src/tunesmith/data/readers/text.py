"""Text files in known encodings, decoded line by line so that a bad byte has a line number."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from tunesmith.errors import Problem

CHUNK_BYTES = 1 << 20


def read_lines(path: Path, encoding: str) -> Iterator[tuple[int, str | Problem]]:
    """Yields (line number, text or what is wrong with it); a leading byte order mark is skipped."""
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        # A line break is no single byte there: decode first, split then.
        yield from _split_lines(read_chunks(path, encoding))
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                text = line.decode(encoding)
                yield number, text.removeprefix("\ufeff") if number == 1 else text
            except UnicodeDecodeError as error:
                yield number, encoding_problem(f"{path}:{number}", line, encoding, error)
                return


def _split_lines(chunks: Iterator[str | Problem]) -> Iterator[tuple[int, str | Problem]]:
    rest, number = "", 0
    for chunk in chunks:
        if isinstance(chunk, Problem):
            yield number + 1, chunk
            return
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            number += 1
            yield number, line
    if rest:
        yield number + 1, rest


def read_chunks(path: Path, encoding: str) -> Iterator[str | Problem]:
    """Yields the file's text in pieces of about CHUNK_BYTES, or one problem and no more."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, is_start = 1, True
    with path.open("rb") as file:
        while True:
            raw = file.read(CHUNK_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                before = bytes(error.object[: error.start])
                at = line + before.count(b"\n")
                yield encoding_problem(f"{path}:{at}", bytes(error.object), encoding, error)
                return
            if text:
                yield text.removeprefix("\ufeff") if is_start else text
                is_start = False
            if not raw:
                return
            line += raw.count(b"\n")


def encoding_problem(where: str, raw: bytes, encoding: str, error: UnicodeDecodeError) -> Problem:
    """Names the bad byte and, where the bytes look like Chinese text, the encoding to ask for."""
    column = error.start - raw.rfind(b"\n", 0, error.start)
    found = f"byte 0x{raw[error.start]:02x} at column {column}, which is no {encoding}"
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
