"""Text files in known encodings, decoded piece by piece so that a bad byte has a line number.

All line ends become line feeds, those of old Macs (a lone carriage return) included.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

from tunesmith.data.readers.compressed import BrokenArchiveError, read_pieces
from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.encodings import bad_byte_problem, encoding_of, looks_like_gb18030
from tunesmith.errors import Problem

CHUNK_BYTES = 1 << 20

MAX_ROW_CHARS = 64 << 20
"""A longer row is taken for a missing quote or a missing line end, and named."""

MAX_BAD_BYTES = 1000
"""A file with more of them is in another encoding: it is not read on."""


def read_lines(file: DataFile) -> Iterator[tuple[int, str | Problem]]:
    """Yields (line number, text or what is wrong with it); a leading byte order mark is skipped.

    Lines behind one with a bad byte go on, unless the whole file seems to be in another encoding.
    """
    number, parts, size = 1, list[str](), 0
    problem: Problem | None = None
    for chunk in read_chunks(file):
        if isinstance(chunk, Problem):
            problem = problem or chunk
            continue
        first, *others = chunk.split("\n")
        parts.append(first)
        size += len(first)
        if size > MAX_ROW_CHARS:
            problem = problem or long_row_problem(f"{file.path}:{number}")
            parts.clear()
        if others:
            yield number, problem or "".join(parts)
            last = others.pop()
            yield from enumerate(others, start=number + 1)
            number += 1 + len(others)
            parts, size, problem = [last], len(last), None
    if problem or size:
        yield number, problem or "".join(parts)


def read_chunks(file: DataFile) -> Iterator[str | Problem]:
    """Yields the text in pieces of about CHUNK_BYTES, with problems where bytes are left out."""
    encoding = encoding_of(file)
    if isinstance(encoding, Problem):
        yield encoding
        return
    decoder = _Decoder(file, encoding)
    try:
        for raw in read_pieces(file.path, CHUNK_BYTES, file.meter):
            yield from decoder.feed(raw)
            if decoder.is_given_up:
                return
    except BrokenArchiveError as error:
        where = f"{file.path}:{decoder.line}"
        yield Problem(where, "data.compressed", str(error), "a file that can be unpacked whole")
        return
    yield from decoder.feed(b"", is_end=True)


def long_row_problem(where: str) -> Problem:
    """A row that is longer than any row can be."""
    found = f"a row of more than {MAX_ROW_CHARS:,} characters"
    return Problem(where, "data.long-row", found, "shorter rows; a quote or line end is missing?")


class _Decoder:
    """Turns bytes into text and knows the line, column and offset it has come to."""

    def __init__(self, file: DataFile, encoding: str) -> None:
        self.file = file
        # A line break is no single byte there: behind a bad one everything is shifted.
        self.is_wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.newlines = io.IncrementalNewlineDecoder(None, translate=True)
        self.line = 1
        self.column = 1
        self.num_bytes = 0
        self.num_bad = 0
        self.is_start = True
        self.is_given_up = False

    def feed(self, raw: bytes, *, is_end: bool = False) -> Iterator[str | Problem]:
        """Decodes the next bytes; a bad one is left out and its problem stands in its place."""
        self.num_bytes += len(raw)
        while True:
            try:
                text = self.decoder.decode(raw, is_end)
            except UnicodeDecodeError as error:
                self.decoder.reset()
                yield from self._passed(self.decoder.decode(error.object[: error.start]))
                self.decoder.reset()
                yield self._problem(error)
                if self.is_given_up:
                    return
                raw = error.object[error.end :]
            else:
                yield from self._passed(text, is_end=is_end)
                return

    def _passed(self, text: str, *, is_end: bool = False) -> Iterator[str]:
        text = self.newlines.decode(text, is_end)
        if self.is_start and text:
            text = text.removeprefix("\ufeff")
            self.is_start = False
        if text:
            self.line += text.count("\n")
            last = text.rfind("\n")
            self.column = len(text) - last if last >= 0 else self.column + len(text)
            yield text

    def _problem(self, error: UnicodeDecodeError) -> Problem:
        self.num_bad += 1
        is_other = self.is_wide or looks_like_gb18030(error)
        self.is_given_up = is_other or self.num_bad > MAX_BAD_BYTES
        offset = self.num_bytes - len(error.object) + error.start
        return bad_byte_problem(f"{self.file.path}:{self.line}", error, self.column, offset)
