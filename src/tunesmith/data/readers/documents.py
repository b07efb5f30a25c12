"""Plain text and Markdown files as raw text, for pretraining."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.row import Row
from tunesmith.data.readers.text import MAX_ROW_CHARS, long_row_problem, read_chunks
from tunesmith.errors import Problem

PIECE_CHARS = 1 << 20

# What a long text is cut behind: the last of the first kind that is met in the second half.
BREAKS = ("\n\n", "\n", "。", ". ", " ")


def read_text(file: DataFile) -> Iterator[Row]:
    """Yields `{"text": ...}`: the whole file is one document.

    More than 1 MiB characters are cut into pieces of at least half of that, so that memory stays
    bounded: at a blank line, else at a line end, else behind a sentence or a word. Joined they are
    the file, but for pieces without any text; the line of a piece is the one it starts on.
    """
    text, line, is_blank = "", 1, True
    for chunk in read_chunks(file):
        if isinstance(chunk, Problem):
            yield Row(file.origin(line), chunk)
            return
        is_blank = is_blank and chunk.isspace()
        text += chunk
        while len(text) > PIECE_CHARS:
            end = _cut(text)
            if not text[:end].isspace():
                yield Row(file.origin(line), {"text": text[:end]})
            line += text.count("\n", 0, end)
            text = text[end:]
    if is_blank or not text.isspace():
        yield _last(file, text, line, is_blank=is_blank)


def read_markdown(file: DataFile) -> Iterator[Row]:
    """Yields `{"text": ...}`, one document however long the file is."""
    parts: list[str] = []
    size = 0
    for chunk in read_chunks(file):
        if isinstance(chunk, Problem):
            yield Row(file.origin(1), chunk)
            return
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ROW_CHARS:
            yield Row(file.origin(1), long_row_problem(f"{file.path}:1"))
            return
    text = "".join(parts)
    yield _last(file, text, 1, is_blank=not text or text.isspace())


def _last(file: DataFile, text: str, line: int, *, is_blank: bool) -> Row:
    """The end of a document; one blank file among a thousand stops nothing."""
    if is_blank:
        found = "nothing but blank lines"
        problem = Problem(f"{file.path}:1", "data.empty-file", found, "some text")
        return Row(file.origin(1), problem)
    return Row(file.origin(line), {"text": text})


def _cut(text: str) -> int:
    for mark in BREAKS:
        at = text.rfind(mark, PIECE_CHARS // 2, PIECE_CHARS)
        if at >= 0:
            return at + len(mark)
    return PIECE_CHARS
