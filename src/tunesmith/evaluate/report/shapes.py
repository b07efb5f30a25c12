"""Values out of files that may hold anything: what has another shape than expected is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, cast

DEEPEST = 60
"""Levels of nesting; Python walks through a few hundred before it gives up."""


def decoded(text: str) -> object:
    """What a JSON text says; None for what is no JSON, or nested beyond reason."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    may_be_deep = text.count("[") + text.count("{") > DEEPEST
    return None if may_be_deep and not _is_flat(found, DEEPEST) else found


def _is_flat(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        inner = list(cast("dict[str, object]", value).values())
    elif isinstance(value, list):
        inner = cast("list[object]", value)
    else:
        return True
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner)


def mapping_of(value: object) -> dict[str, Any]:
    """The mapping, or an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def mappings_in(value: object) -> Iterator[dict[str, Any]]:
    """The mappings of a list."""
    if isinstance(value, list):
        for each in cast("list[object]", value):
            if isinstance(each, dict):
                yield cast("dict[str, Any]", each)


def texts_in(value: object) -> list[str]:
    """The texts of a list."""
    return (
        [each for each in cast("list[object]", value) if isinstance(each, str)]
        if isinstance(value, list)
        else []
    )


def numbers_in(value: object) -> list[float]:
    """The finite numbers of a list."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [number for each in items if (number := number_of(each)) is not None]


def number_of(value: object) -> float | None:
    """A finite number, or None; True is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text_of(value: object) -> str:
    """The text, or an empty one."""
    return value if isinstance(value, str) else ""
