"""A window of text that moves over a JSON file: values are decoded one by one."""

from __future__ import annotations

import json
import re

import msgspec

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.text import MAX_ROW_CHARS, long_row_problem, read_chunks
from tunesmith.errors import Problem

SPACE = re.compile(r"[ \t\r\n]*")
OPENED_LIST = re.compile(r"\[[ \t\r\n]*([^ \t\r\n])?")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BrokenJsonError(Exception):
    """The JSON cannot be understood from this place on."""

    def __init__(self, line: int, problem: Problem) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


class Scanner:
    """Reads tokens and whole values of a file, and counts lines.

    The window is cut only when it has run out, and a value that does not fit is tried again with
    twice the text: time grows with the length of the file alone.
    """

    def __init__(self, file: DataFile) -> None:
        self.path = file.path
        self.chunks = read_chunks(file)
        self.failure: Problem | None = None
        self.text = ""
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder(parse_constant=_refuse_constant)

    def skip_space(self) -> str:
        """Moves to the next character that is no space and returns it ('' at the end)."""
        while True:
            match = SPACE.match(self.text, self.at)
            end = match.end() if match else self.at
            self._move_to(end)
            if end < len(self.text):
                return self.text[end]
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        """Moves over one expected character; '' stands for the end of the file."""
        found = self.text[self.at : self.at + 1]
        if found != char:
            expected = f"`{char}`" if char else "the end of the file"
            raise self.broken(f"{found!r}" if found else "the end of the file", expected)
        self.at += 1

    def opens_list_of_objects(self) -> bool:
        """Whether `[` and `{` come next; moves over nothing."""
        while True:
            match = OPENED_LIST.match(self.text, self.at)
            if not match:
                return False
            if match.group(1):
                return match.group(1) == "{"
            if not self._more():
                return False

    def value(self) -> object:
        """Decodes one JSON value, reading on until it is whole."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._more():
                    continue
                raise self._broken_value(error) from None
            except (ValueError, RecursionError) as error:  # NaN, 5,000 digits, 10,000 brackets
                reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
                raise self.broken(f"broken JSON: {reason}", "plain JSON values") from None
            is_number = isinstance(value, int | float)
            if is_number and end > len(self.text) - 3 and self._more():
                continue  # its digits may go on in the next piece
            self._check_text(end)
            self._move_to(end)
            return value

    def broken(self, found: str, expected: str, lines: int = 0) -> BrokenJsonError:
        """The error for what stands here, or some lines further on."""
        line = self.line + lines
        return BrokenJsonError(line, Problem(f"{self.path}:{line}", "data.json", found, expected))

    def _move_to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _check_text(self, end: int) -> None:
        """Refuses half surrogate pairs: Python takes them, tokenizers die of them."""
        if not SURROGATE.search(self.text, self.at, end):
            return
        try:
            msgspec.json.decode(self.text[self.at : end])
        except msgspec.DecodeError as error:
            raise self.broken(f"broken JSON: {error}", "text in whole characters") from None

    def _broken_value(self, error: json.JSONDecodeError) -> BrokenJsonError:
        if self._is_too_long():
            return BrokenJsonError(self.line, long_row_problem(f"{self.path}:{self.line}"))
        lines = self.text.count("\n", self.at, error.pos)
        return self.broken(f"broken JSON: {error.msg}", "JSON objects", lines)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        if self._is_too_long():
            return False
        # An unfinished string is reported at its start, all else where the text ends.
        near_end = error.pos >= len(self.text) - 16
        return near_end or error.msg.startswith(("Unterminated string", "Invalid \\"))

    def _is_too_long(self) -> bool:
        return len(self.text) - self.at > MAX_ROW_CHARS

    def _more(self) -> bool:
        """Doubles what is left of the window; false at the end of the file."""
        parts = [self.text[self.at :]]
        wanted = len(parts[0])
        while wanted >= 0 and not self.failure:
            chunk = next(self.chunks, None)
            if chunk is None:
                break
            if isinstance(chunk, Problem):
                self.failure = chunk
                break
            parts.append(chunk)
            wanted -= len(chunk)
        if len(parts) > 1:
            self.text = "".join(parts)
            self.at = 0
            return True
        if self.failure:
            raise BrokenJsonError(int(self.failure.where.rsplit(":", 1)[1]), self.failure)
        return False


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
