"""A JSON array of objects, read piece by piece: the file never stands in memory whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tunesmith.data.readers.json_lines import as_object
from tunesmith.data.readers.text import read_chunks
from tunesmith.errors import Problem
from tunesmith.types import Json

MAX_ROW_CHARS = 64 << 20
"""A row longer than this is taken for a missing quote."""


def read_json_array(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Json] | Problem]]:
    """Yields (line where the object starts, object or problem); stops at broken JSON."""
    scanner = _Scanner(path, encoding)
    try:
        scanner.skip_space()
        scanner.take("[")
        is_more = scanner.skip_space() != "]"
        while is_more:
            scanner.skip_space()
            line = scanner.line
            yield line, as_object(scanner.value(), f"{path}:{line}")
            is_more = scanner.skip_space() == ","
            if is_more:
                scanner.take(",")
        scanner.take("]")
        if scanner.skip_space():
            scanner.take("")
    except _BrokenError as broken:
        yield broken.problem_line, broken.problem


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


class _BrokenError(Exception):
    def __init__(self, line: int, problem: Problem) -> None:
        super().__init__(problem)
        self.problem_line = line
        self.problem = problem


class _Scanner:
    """A window of decoded text that moves over the file and counts lines."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.path = path
        self.chunks = read_chunks(path, encoding)
        self.text = ""
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder(parse_constant=_refuse_constant)

    def skip_space(self) -> str:
        """Moves to the next character that is no space and returns it ('' at the end)."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        """Moves over one expected character."""
        found = self.text[self.at : self.at + 1]
        if found != char:
            expected = f"`{char}`" if char else "the end of the file behind `]`"
            raise self._broken(f"{found!r}" if found else "the end of the file", expected)
        self.at += 1

    def value(self) -> object:
        """Decodes one JSON value, reading on until it is whole."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._more():
                    continue
                lines = self.text.count("\n", self.at, error.pos)
                raise self._broken(
                    f"broken JSON: {error.msg}", "an array of JSON objects", lines
                ) from None
            except (ValueError, RecursionError) as error:  # NaN, 5,000 digits, 10,000 brackets
                reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
                raise self._broken(f"broken JSON: {reason}", "plain JSON values") from None
            if end > len(self.text) - 3 and self._more():
                continue  # a number may go on in the next piece
            self._check_text(self.text[self.at : end])
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def _check_text(self, text: str) -> None:
        """Refuses half surrogate pairs: Python takes them, tokenizers die of them."""
        if "\\u" not in text:
            return
        try:
            msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise self._broken(f"broken JSON: {error}", "text in whole characters") from None

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        if len(self.text) - self.at > MAX_ROW_CHARS:
            return False
        # An unfinished string is reported at its start, all else where the text ends.
        near_end = error.pos >= len(self.text) - 16
        return near_end or error.msg.startswith(("Unterminated string", "Invalid \\"))

    def _more(self) -> bool:
        chunk = next(self.chunks, None)
        if chunk is None:
            return False
        if isinstance(chunk, Problem):
            raise _BrokenError(int(chunk.where.rsplit(":", 1)[1]), chunk)
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return True

    def _broken(self, found: str, expected: str, lines: int = 0) -> _BrokenError:
        line = self.line + lines
        return _BrokenError(line, Problem(f"{self.path}:{line}", "data.json", found, expected))
