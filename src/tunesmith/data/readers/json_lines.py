"""JSON lines: one object a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.row import Row
from tunesmith.data.readers.text import read_lines
from tunesmith.errors import Problem
from tunesmith.types import Json, Origin


def read_json_lines(file: DataFile) -> Iterator[Row]:
    """Yields the object or problem of each line; blank lines are skipped."""
    for number, line in read_lines(file):
        origin = file.origin(number)
        if isinstance(line, Problem):
            yield Row(origin, line)
        elif line and not line.isspace():
            yield Row(origin, _decode(line, origin))


def _decode(line: str, origin: Origin) -> dict[str, Json] | Problem:
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        found = f"broken JSON: {reason}"
        return Problem(str(origin), "data.json", found, "one JSON object on the line")
    except RecursionError:
        found = "broken JSON: nested too deep"
        return Problem(str(origin), "data.json", found, "plain JSON values")
    return as_object(value, origin)


def as_object(value: object, origin: Origin) -> dict[str, Json] | Problem:
    """The value if it is a JSON object, else the problem."""
    if isinstance(value, dict):
        return cast("dict[str, Json]", value)
    names = {"list": "an array", "str": "a string", "NoneType": "null", "bool": "true or false"}
    kind = names.get(type(value).__name__, "a number")
    return Problem(str(origin), "data.row", kind, "a JSON object with named columns")
