"""The recipe's `objective`: what is minimized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.base import Auto, Strict
from tunesmith.config.distill import DistillConfig
from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.policy import GroupConfig, PpoConfig


class SftConfig(Strict):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    name: Literal["sft"] = "sft"
    variant: Literal["plain", "dft"] = "plain"
    """dft weighs each token's loss with its own probability (arXiv 2508.05629): what the model
    finds unlikely pulls less. Validation is without it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each target's probability spread over the vocabulary; validation is without it."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's normalizer (arXiv 2204.02311; 1e-4 there), which
    keeps logits from drifting; validation is without it."""

    @model_validator(mode="after")
    def _dft_stands_alone(self) -> SftConfig:
        if self.variant == "dft" and (self.label_smoothing or self.z_loss):
            raise ValueError("`variant: dft` without `label_smoothing` and `z_loss`")
        return self


class PretrainConfig(Strict):
    """Continued pretraining: cross-entropy on all tokens of raw text."""

    name: Literal["pretrain"]
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's normalizer; validation is without it."""


PairName = Literal[
    "dpo", "dpo_norm", "robust", "hinge", "ipo", "simpo", "orpo", "cpo", "exo", "nca", "sppo",
    "apo_zero", "apo_down",
]  # fmt: skip


class PreferenceConfig(Strict):
    """Learning from pairs of a better and a worse answer: DPO and its relatives."""

    name: PairName
    beta: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Strength of the tie to the reference; auto is what the loss's authors take."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How often a label is taken to be flipped: of dpo (cDPO), robust, simpo, cpo, exo."""
    margin: Auto | Annotated[float, Field(ge=0)] = "auto"
    """By how much the chosen reward is to lead: of simpo, whose auto is 1."""
    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """How much of the chosen answer's own loss is added (RPO); null is what the paper does."""
    reference: bool | Literal["cached"] = True
    """Compare with the model as it was before training, where the loss does so.

    cached runs it once over all pairs before training and keeps the numbers on disk: then no copy
    of the weights is needed and each step has a forward less."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> PreferenceConfig:
        smoothed = ("dpo", "robust", "simpo", "cpo", "exo")
        if self.label_smoothing and self.name not in smoothed:
            raise ValueError(f"`label_smoothing` with one of {', '.join(smoothed)}")
        if self.reference is not True and self.name in ("simpo", "orpo", "cpo"):
            raise ValueError(f"`reference` left out: {self.name} looks at none")
        if self.name == "exo" and not self.label_smoothing:
            raise ValueError("`label_smoothing` above 0 with exo, which takes its logarithm")
        if self.margin not in ("auto", 0.0) and self.name != "simpo":
            raise ValueError("`margin` with simpo")
        return self


class RatedConfig(Strict):
    """Learning from answers that were rated good or bad, without pairs: KTO and its relative."""

    name: Literal["kto", "apo_zero_unpaired"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the tie to the reference."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of good answers. KTO's authors want this times the number of good answers to be 1 to 4/3
    times the same of the bad ones: with 3 good to 1 bad, 0.33 to 0.44 here."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of bad answers."""
    reference: bool | Literal["cached"] = True
    """Compare with the model as it was before training; kto alone can do without.

    cached, of apo_zero_unpaired, runs it once over all answers before training."""

    @model_validator(mode="after")
    def _has_what_to_compare_with(self) -> RatedConfig:
        if not self.reference and self.name != "kto":
            raise ValueError("`reference: false` with kto")
        if self.reference == "cached" and self.name == "kto":
            raise ValueError(
                "`reference: true` or `false` with kto: its mismatched answers change from step to "
                "step, so they cannot be known before"
            )
        return self


ObjectiveConfig = Annotated[
    SftConfig
    | PretrainConfig
    | PreferenceConfig
    | RatedConfig
    | DistillConfig
    | RewardConfig
    | ClassifyConfig
    | GroupConfig
    | PpoConfig,
    Field(discriminator="name"),
]
