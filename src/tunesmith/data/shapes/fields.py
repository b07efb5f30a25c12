"""Fields of a row read as what they must be; every mistake says what was found and expected."""

from __future__ import annotations

import json
import math
from typing import cast

import msgspec

from tunesmith.types import Json


class MistakeError(Exception):
    """What is wrong with a row; the caller knows where the row is.

    `column` is the canonical column that the mistake is in, where it is in one.
    """

    def __init__(self, code: str, found: str, expected: str, column: str | None = None) -> None:
        super().__init__(code, found, expected, column)
        self.code = code
        self.found = found
        self.expected = expected
        self.column = column


def objects(value: Json, where: str) -> list[dict[str, Json]]:
    """A list of objects, or (in tables, whose cells are text) the JSON of one."""
    value = from_json_text(value, where)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return cast("list[dict[str, Json]]", value)
    raise MistakeError(
        "data.bad-type", f"{where} = {show(value)}", f"{where} as a list of objects", root(where)
    )


def from_json_text(value: Json, where: str) -> Json:
    """The value behind a text that starts like a JSON list or object; others as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    return json_value(value, where, "data.bad-type", f"{where} that is")


def json_value(value: str, where: str, code: str, what: str) -> Json:
    """The value of a JSON text; `what` begins the message where there is none."""
    try:
        # Unlike Python's own, it refuses half surrogate pairs, of which tokenizers die.
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        expected = "JSON (as json.dumps writes it; str() of a Python list is none)"
        raise MistakeError(code, f"{what} no JSON ({reason})", expected, root(where)) from None


TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts that are text; tables fill a missing type with null."""


def text(value: Json, where: str) -> str:
    """Text, or the text of OpenAI's content parts put together; a number is its digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, list) and value:
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None
            for part in value
        ]
        if all(isinstance(item, str) for item in texts):
            return "".join(cast("list[str]", texts))
    raise MistakeError("data.bad-type", f"{where} = {show(value)}", f"{where} as text", root(where))


def first_of(item: dict[str, Json], *names: str) -> tuple[str, Json]:
    """The first of these fields that has a value; tables fill the others with null."""
    for name in names:
        if item.get(name) is not None:
            return name, item[name]
    return next((name for name in names if name in item), names[0]), None


def optional_text(value: Json, where: str) -> str | None:
    """Text, or None where there is none or an empty one."""
    return text(value, where) or None if value is not None else None


def truth(value: Json, where: str) -> bool:
    """A yes or no, in the spellings of JSON and of tables."""
    if not is_truth(value):
        raise MistakeError("data.label", f"{where} = {show(value)}", "true or false", root(where))
    return TRUTHS[str(value).strip().lower()]


def is_truth(value: Json) -> bool:
    """Whether a value says yes or no."""
    return str(value).strip().lower() in TRUTHS


TRUTHS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "desirable", "是", "好", "对"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "no", "bad", "undesirable"), False),
    **dict.fromkeys(("否", "坏", "差", "错"), False),
}


def root(where: str) -> str:
    """The column of a place such as `messages[0].content`."""
    return where.split("[")[0].split(".")[0]


def show(value: Json) -> str:
    """The start of a value, for a message."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
