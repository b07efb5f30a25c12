"""Objectives that put another head on the model: one score, or one logit for each label."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunesmith.config.base import Auto, Strict


class RewardConfig(Strict):
    """A reward model: one score for a conversation, higher for the answers that people prefer."""

    name: Literal["reward"]
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0 (arXiv 2312.09244;
    0.01 there); validation is without it."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """By how much the chosen score is to lead (arXiv 2307.09288 eq. 2); validation is without
    it."""


class ClassifyConfig(Strict):
    """A classifier: the probability of each label for a text or a conversation."""

    name: Literal["classify"]
    labels: Auto | list[str] = "auto"
    """The labels in the order of the head's rows; auto is those of the training data, sorted."""

    @field_validator("labels", mode="before")
    @classmethod
    def _as_texts(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        # YAML reads 1 and true as what they are; in data they are spelled as in JSON.
        items: list[object] = value
        return [str(item).lower() if isinstance(item, bool) else _digits(item) for item in items]

    @field_validator("labels", mode="after")
    @classmethod
    def _are_several(cls, value: Auto | list[str]) -> Auto | list[str]:
        if value != "auto" and (len(value) < 2 or len(set(value)) < len(value)):
            raise ValueError("at least two labels, all different")
        return value


def _digits(item: object) -> object:
    return str(item) if isinstance(item, int) else item


HeadConfig = RewardConfig | ClassifyConfig
"""Objectives whose model has scores in the place of its vocabulary's logits."""
