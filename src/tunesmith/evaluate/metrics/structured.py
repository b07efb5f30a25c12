"""Answers that are to be JSON: whether they are, fit a schema, and hold the label's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np

from tunesmith.errors import UserError
from tunesmith.evaluate.intervals import Floats, Measured, from_sums, ratio, share_of
from tunesmith.evaluate.metrics.base import MeasureOptions, missing_library
from tunesmith.evaluate.prediction import Prediction

_FENCE = re.compile(r"\s*```[a-zA-Z]*[ \t]*\n(.*?)\n?```\s*", re.DOTALL)

Leaves = dict[str, Any]


def json_metrics(predictions: Sequence[Prediction], options: MeasureOptions) -> list[Measured]:
    """Validity of all answers; fields of those whose label is JSON, too.

    Raises:
        UserError: the schema is none (`evaluate.schema`), or jsonschema is not there
            (`evaluate.library`).
    """
    valid = [_parsed(each.prediction, allows_fence=False) is not _NONE for each in predictions]
    found = [share_of("json_valid", valid, signature="whole-answer|rfc8259|fence:no")]
    if options.schema is not None:
        fits = _schema_check(options.schema)
        rows = [fits(_parsed(each.prediction)) for each in predictions]
        found.append(share_of("json_schema_valid", rows, signature="jsonschema|fence:read"))
    return [*found, *_field_figures(predictions)]


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list and nothing else."""
    return isinstance(_parsed(text, allows_fence=False), (dict, list))


def leaves(value: Any, path: str = "") -> Leaves:
    """The values at the ends of a JSON value by their paths, such as `a.b[0]`.

    Empty objects and lists are ends, too. Numbers are equal as numbers: 1 and 1.0; true is not 1.
    """
    if isinstance(value, dict) and value:
        return {
            name: leaf
            for key, inner in value.items()
            for name, leaf in leaves(inner, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(value, list) and value:
        return {
            name: leaf
            for place, inner in enumerate(value)
            for name, leaf in leaves(inner, f"{path}[{place}]").items()
        }
    return {path: _comparable(value)}


class _None:
    """No JSON; null is a value."""


_NONE = _None()


def _parsed(text: str, *, allows_fence: bool = True) -> Any:
    """The value that the text is, `_NONE` if it is none."""
    fenced = _FENCE.fullmatch(text) if allows_fence else None
    try:
        return json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NONE


def _refuse(constant: str) -> NoReturn:
    """NaN and Infinity, which Python reads, are not JSON."""
    raise ValueError(constant)


def _comparable(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (dict, list)):
        return "{}" if isinstance(value, dict) else "[]", type(value).__name__
    return (value, type(value).__name__) if isinstance(value, bool) else value


def _field_figures(predictions: Sequence[Prediction]) -> list[Measured]:
    stats_RK = np.zeros((len(predictions), 3))
    has_label: list[bool] = []
    for row, each in enumerate(predictions):
        label = _NONE if each.label is None else _parsed(each.label)
        has_label.append(label is not _NONE)
        if label is not _NONE:
            answer = _parsed(each.prediction)
            wanted, given = leaves(label), {} if answer is _NONE else leaves(answer)
            same = sum(name in given and given[name] == wanted[name] for name in wanted)
            stats_RK[row] = same, len(wanted), len(given)
    if not any(has_label):
        return []
    figures = {"json_field_accuracy": _accuracy, "json_field_f1": _f1}
    return [
        from_sums(
            name,
            stats_RK,
            of_sums,
            rows=[
                float(value) if has else None
                for value, has in zip(of_sums(stats_RK), has_label, strict=True)
            ],
            signature="leaves-by-path|lists:in-order|str:strip|fence:read|corpus",
        )
        for name, of_sums in figures.items()
    ]


def _accuracy(sums_BK: Floats) -> Floats:
    return ratio(sums_BK[:, 0], sums_BK[:, 1])


def _f1(sums_BK: Floats) -> Floats:
    return ratio(2 * sums_BK[:, 0], sums_BK[:, 1] + sums_BK[:, 2])


def _schema_check(schema: Mapping[str, Any]) -> Any:
    if find_spec("jsonschema") is None:
        raise missing_library("json_schema_valid", "jsonschema", "rewards")
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema)
    try:
        kind.check_schema(dict(schema))
    except SchemaError as error:
        raise _bad_schema(error.message) from None
    # jsonschema would fetch what a reference names.
    foreign = [each for each in _references(schema) if not each.startswith("#")]
    if foreign:
        raise _bad_schema(f"$ref {foreign[0]!r}, which would be fetched")
    validator = kind(dict(schema))
    return lambda value: value is not _NONE and validator.is_valid(value)


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def _bad_schema(found: str) -> UserError:
    return UserError(
        "evaluate.schema",
        "metric json",
        found=found,
        expected="a JSON schema that refers to itself only",
    )
