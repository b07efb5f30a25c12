"""`json_schema`: whether an answer is JSON that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from tunesmith.errors import UserError
from tunesmith.objectives.rewards.base import Answered

MAX_STARTS = 20
"""Places of a text at which a JSON value is looked for."""

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class _Validator(Protocol):
    def is_valid(self, instance: object) -> bool: ...


@dataclass(frozen=True)
class JsonSchemaReward:
    """1 for JSON that fits, `valid_json` for JSON that does not, 0 for none.

    Args:
        file: path of the schema.
        inline: the schema itself, instead of a file.
        valid_json: partial credit.
        whole: the answer has to be JSON and nothing else; otherwise its last fenced block, or the
            first value in it, is taken.
    """

    file: str | None = None
    inline: Mapping[str, object] | None = None
    valid_json: float = 0.0
    whole: bool = False

    @cached_property
    def validator(self) -> _Validator:
        """The schema, read and checked.

        Raises:
            UserError: `reward.schema`, `reward.library`.
        """
        return _validator(self._schema(), self.file or "objective.rewards: inline")

    def _schema(self) -> Mapping[str, object]:
        if self.inline is not None:
            return self.inline
        path = Path(self.file or "")
        try:
            return json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise _bad_schema(str(path), str(error)) from None

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One verdict for each answer."""
        return [self._judge(answered.answer) for answered in answers]

    def _judge(self, answer: str) -> float:
        for text in [answer] if self.whole else _candidates(answer):
            try:
                value = _read(text) if self.whole else _read_first(text)
                return 1.0 if self.validator.is_valid(value) else self.valid_json
            except (ValueError, RecursionError):  # no JSON, or nested without end
                continue
        return 0.0


def _candidates(answer: str) -> Iterator[str]:
    """Texts that may begin with the JSON value: the answer, its last block, each brace in it."""
    answer = answer.strip()
    if answer[:1] in '{["':
        yield answer
    yield from reversed(_FENCED.findall(answer)[-MAX_STARTS:])
    starts = [found.start() for found in re.finditer(r"[{\[]", answer)][:MAX_STARTS]
    yield from (answer[start:] for start in starts)
    yield answer


def _read(text: str) -> object:
    return json.loads(text, parse_constant=_refuse)


def _read_first(text: str) -> object:
    return json.JSONDecoder(parse_constant=_refuse).raw_decode(text.strip())[0]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _validator(schema: Mapping[str, object], where: str) -> _Validator:
    try:
        jsonschema = cast(Any, import_module("jsonschema"))
    except ImportError:
        raise UserError(
            "reward.library",
            where,
            found="no library `jsonschema`",
            expected="it to be installed for the reward json_schema",
            try_="pip install jsonschema",
        ) from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise _bad_schema(where, f"$ref {reference!r}, which would be fetched")
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise _bad_schema(where, error.message) from None
    return kind(schema)


def _references(part: object) -> Iterator[str]:
    if isinstance(part, Mapping):
        for key, value in cast("Mapping[str, object]", part).items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(part, list):
        for value in cast("list[object]", part):
            yield from _references(value)


def _bad_schema(where: str, found: str) -> UserError:
    return UserError(
        "reward.schema", where, found=found, expected="a JSON schema that refers to itself only"
    )
