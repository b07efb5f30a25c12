"""JSON lines: one object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec

from tunesmith.data.readers.text import read_lines
from tunesmith.errors import Problem
from tunesmith.types import Json


def read_json_lines(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Json] | Problem]]:
    """Yields (line number, object or problem); blank lines are skipped."""
    for number, line in read_lines(path, encoding):
        where = f"{path}:{number}"
        if isinstance(line, Problem):
            yield number, line
        elif line.strip():
            yield number, _decode(line, where)


def _decode(line: str, where: str) -> dict[str, Json] | Problem:
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        return Problem(where, "data.json", f"broken JSON: {reason}", "one JSON object on the line")
    except RecursionError:
        return Problem(where, "data.json", "broken JSON: nested too deep", "plain JSON values")
    return as_object(value, where)


def as_object(value: object, where: str) -> dict[str, Json] | Problem:
    """The value if it is a JSON object, else the problem."""
    if isinstance(value, dict):
        return cast("dict[str, Json]", value)
    names = {"list": "an array", "str": "a string", "NoneType": "null", "bool": "true or false"}
    kind = names.get(type(value).__name__, "a number")
    return Problem(where, "data.row", kind, "a JSON object with named columns")
