"""How a JSON file is laid out: an array, one object a line, or objects over many lines."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import msgspec

from tunesmith.data.readers.data_file import DataFile, Meter
from tunesmith.data.readers.text import read_chunks
from tunesmith.errors import DataError, Problem

Form = Literal["array", "lines", "objects"]

MAX_FIRST_LINE_CHARS = 4 << 20
"""A longer first line is read piece by piece: it may be a whole data set."""

# The first line that is not blank, and the first character behind it.
BEGINNING = re.compile(r"(\S[^\n]*)(?:\n\s*(\S))?")


def json_form(file: DataFile) -> Form | Problem | None:
    """Looks at the first lines; None if the file does not start as JSON.

    Raises:
        DataError: there is nothing but blank lines (`data.empty-file`).
    """
    beginning = _beginning(file)
    if isinstance(beginning, Problem):
        return beginning
    line, following = beginning
    if line[0] == "[":
        return "array"
    if line[0] != "{":
        return None
    # A single object is a line of a .jsonl file, and may be a wrapper around rows in a .json file.
    is_named_so = file.ending in (".jsonl", ".ndjson") and is_json_object(line)
    is_lines = following == "{" or is_named_so or (following and is_json_object(line))
    return "lines" if is_lines else "objects"


def is_json_object(line: str) -> bool:
    """Whether a line is one whole JSON object."""
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _beginning(file: DataFile) -> tuple[str, str | None] | Problem:
    """The first line and the character behind it, None where the line is the last or very long."""
    text = ""
    problem: Problem | None = None
    match = None
    for chunk in read_chunks(replace(file, meter=Meter())):
        if isinstance(chunk, Problem):
            problem = problem or chunk
            continue
        text = (text + chunk).lstrip()
        match = BEGINNING.match(text)
        if match and (match.group(2) or len(text) > MAX_FIRST_LINE_CHARS):
            break
    if match:
        return match.group(1), match.group(2)
    if problem:
        return problem
    found = "nothing but blank lines"
    raise DataError([Problem(str(file.path), "data.empty-file", found, "at least one row")])
