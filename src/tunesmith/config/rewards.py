"""The recipe's `objective.rewards`: what judges sampled answers."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from tunesmith.config.base import PositiveInt, Strict

HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]


class _RewardFunctionConfig(Strict):
    weight: float = 1.0
    """What its rewards are multiplied by in the sum of all; below 0 it punishes."""

    def settings(self) -> dict[str, object]:
        """What the reward function is built from."""
        return self.model_dump(exclude={"kind", "weight"})


class _SameText(_RewardFunctionConfig):
    ignore_case: bool = True
    """Take upper and lower case for the same."""
    ignore_space: bool = True
    """Take any white space for one space, and none beside Chinese characters."""
    ignore_punctuation: bool = True
    """Leave punctuation out, but inside of words and numbers (3.5, it's)."""


class MatchRewardConfig(_SameText):
    """1 where the answer is the reference, or has it in a place."""

    kind: Literal["match"]
    where: Literal["whole", "contains", "start", "end", "last_line"] = "whole"
    """Of the answer: what is compared with the reference; contains, start and end look for it as
    whole words."""
    text: str | None = None
    """What is looked for, instead of the row's own answer."""


class RegexRewardConfig(_RewardFunctionConfig):
    """1 where a regular expression fits the answer; `.` fits line ends, `(?i)` ignores case."""

    kind: Literal["regex"]
    pattern: str
    """Of Python's `regex` library."""
    how: Literal["search", "fullmatch"] = "search"
    """Whether it fits somewhere in the answer, or all of it."""
    group: int | str | None = None
    """Number or name of a group: it has to be the row's own answer, as of `match`."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 1.0
    """For one answer; one that takes longer is not judged."""

    @model_validator(mode="after")
    def _compiles(self) -> RegexRewardConfig:
        import regex  # only here: `tunesmith --help` needs none

        try:
            groups = regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"a regular expression ({error})") from None
        known = [*range(groups.groups + 1), *groups.groupindex]
        if self.group is not None and self.group not in known:
            raise ValueError(f"`group`: one of {', '.join(map(str, known))}")
        return self


class JsonSchemaRewardConfig(_RewardFunctionConfig):
    """1 where the answer has JSON that fits a schema. Needs the library `jsonschema`."""

    kind: Literal["json_schema"]
    file: str | None = None
    """Path of the schema."""
    inline: dict[str, JsonValue] | None = None
    """The schema itself, instead of a file."""
    valid_json: float = 0.0
    """Reward of JSON that does not fit."""
    whole: bool = False
    """The answer has to be JSON and nothing else; else its last fenced block or first value
    counts."""

    @model_validator(mode="after")
    def _has_one_schema(self) -> JsonSchemaRewardConfig:
        if (self.file is None) == (self.inline is None):
            raise ValueError("either `file` or `inline`")
        return self


class MathRewardConfig(_RewardFunctionConfig):
    """1 where the final answer equals the reference's as mathematics."""

    kind: Literal["math"]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    """How far a number with decimals may be off, relative to it."""
    boxed_only: bool = False
    """Only what is in `\\boxed{}` counts as an answer."""


class FormatRewardConfig(_RewardFunctionConfig):
    """1 where tags stand in order, each once and not empty (DeepSeek-R1)."""

    kind: Literal["format"]
    tags: Annotated[list[str], Field(min_length=1)] = Field(["think", "answer"])
    """Their names."""
    whole: bool = True
    """Nothing may stand outside of them; if false, text has to follow the last one."""
    is_opened: bool = False
    """The prompt ends with the first opening tag already."""
    partial: bool = False
    """Give the share of tags that stand there once, where the form is not fulfilled."""

    @field_validator("tags")
    @classmethod
    def _are_names(cls, tags: list[str]) -> list[str]:
        if not all(re.fullmatch(r"[\w:|-]+", tag) for tag in tags):
            raise ValueError("names of tags, without < and >")
        if len(set(tags)) < len(tags):
            raise ValueError("tags that differ")
        return tags


class LengthRewardConfig(_RewardFunctionConfig):
    """A value for short answers, one for long ones, a line between (DAPO's penalty by default)."""

    kind: Literal["length"]
    min_tokens: Annotated[int, Field(ge=0)]
    """Up to here the reward is `at_min`."""
    max_tokens: PositiveInt
    """From here on it is `at_max`."""
    at_min: float = 0.0
    """Reward of short answers."""
    at_max: float = -1.0
    """Reward of long answers."""

    @model_validator(mode="after")
    def _has_room_between(self) -> LengthRewardConfig:
        if self.min_tokens >= self.max_tokens:
            raise ValueError("`min_tokens` below `max_tokens`")
        return self


class RepetitionRewardConfig(_RewardFunctionConfig):
    """A penalty for n-grams that the answer repeats."""

    kind: Literal["repetition"]
    n: PositiveInt = 3
    """How many words; each Chinese character is one."""
    max_penalty: Annotated[float, Field(gt=0)] = 1.0
    """For an answer that repeats itself all the time."""
    unit: Literal["word", "character"] = "word"
    """What is counted."""


class HttpRewardConfig(_RewardFunctionConfig):
    """Rewards from a server."""

    kind: Literal["http"]
    url: str
    """Where answers are posted to: http or https."""
    batch_size: PositiveInt = 64
    """Answers in one request."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """For one request."""
    attempts: PositiveInt = 4
    """At one request, before the run ends."""
    retry_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Before the second attempt; before each further one twice as long, at most 30."""
    headers_from: dict[HeaderName, str] = Field(default_factory=dict[str, str])
    """Headers, each with the name of the environment variable that holds its value."""

    @field_validator("url")
    @classmethod
    def _is_web_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("an address that begins with http:// or https://")
        if "@" in parts.netloc:
            raise ValueError("an address without a password; `headers_from` is for secrets")
        return url


class PythonRewardConfig(_RewardFunctionConfig):
    """A function of an installed package, of the entry point group `tunesmith.rewards`.

    Whoever runs the recipe enables it: `TUNESMITH_PLUGINS=my_reward`.
    """

    kind: Literal["python"]
    name: str
    """Of the entry point."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    """Further arguments of the function."""


class ModelRewardConfig(_RewardFunctionConfig):
    """The score of a reward model (`objective: reward`), of the same chat template."""

    kind: Literal["model"]
    id: str
    """A run directory, an adapter, a folder, or a model on a hub."""


def _long_form(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


RewardFunctionConfig = Annotated[
    MatchRewardConfig
    | RegexRewardConfig
    | JsonSchemaRewardConfig
    | MathRewardConfig
    | FormatRewardConfig
    | LengthRewardConfig
    | RepetitionRewardConfig
    | HttpRewardConfig
    | PythonRewardConfig
    | ModelRewardConfig,
    Field(discriminator="kind"),
    BeforeValidator(_long_form),
]
"""One of `rewards`; a word alone, such as `math`, is short for `{kind: math}`."""
