"""The recipe's `objective` where the model learns from answers that it samples itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from tunesmith.config.base import Auto, PositiveInt, Strict
from tunesmith.config.rewards import RewardFunctionConfig

Share = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


USUAL_CLIP = 0.2
"""Of arXiv 1707.06347 §6.1."""


class SamplingConfig(Strict):
    """What all objectives on sampled answers have in common."""

    rewards: Annotated[tuple[RewardFunctionConfig, ...], Field(min_length=1)]
    """What judges an answer; the weighted sum counts (docs/methods.md lists them)."""
    max_new_tokens: PositiveInt = 256
    """Of an answer; a longer one is cut."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits, in sampling and in the loss."""
    top_p: Share = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    top_k: PositiveInt | None = None
    """Sample among so many of the likeliest tokens; null among all."""
    updates: PositiveInt = 1
    """Passes over the sampled answers before new ones are sampled."""
    mini_batches: PositiveInt = 1
    """Optimizer steps in one pass; `train.global_batch` counts the prompts of all of them."""
    clip: Auto | Annotated[float, Field(gt=0)] = "auto"
    """How far a token's probability may move before it is no longer pulled on; auto is what the
    authors take."""
    clip_high: Auto | Annotated[float, Field(gt=0)] = "auto"
    """The same upward; auto is `clip`, and with an auto `clip` of dapo and gspo a little more."""
    ratio_cap: Annotated[float, Field(gt=1)] | None = None
    """Bound on the ratio of probabilities where the advantage is negative (dual clip, arXiv
    1912.09729; 3 there); null is none."""
    kl_weight: Auto | NotNegative = "auto"
    """Weight of the divergence from the model as it was before training; auto is what the
    authors take."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples answers: the model in training itself, or a copy of it in vLLM."""
    engine_memory: Share | None = None
    """Share of the accelerator's memory that vLLM takes for weights and cache; null is 0.3."""
    engine_weight_cap: Annotated[float, Field(gt=0)] | None = None
    """Weigh each token by its probability here over that in the sampling engine, at most so much
    (2 is usual); null only writes down how far they differ."""
    answers_at_once: Auto | PositiveInt = "auto"
    """Answers sampled in one batch; auto is 64 on a CPU, 256 elsewhere, less where memory ends."""
    validation_prompts: PositiveInt = 64
    """So many of the held-out prompts are answered in a validation, by the likeliest tokens."""

    @model_validator(mode="before")
    @classmethod
    def _short_rewards(cls, value: Any) -> Any:
        """One reward may stand without a list, and one without settings as its name."""
        if not isinstance(value, dict):
            return value
        settings = dict(cast("dict[str, object]", value))
        rewards = settings.get("rewards")
        if isinstance(rewards, str | dict):
            settings["rewards"] = [rewards]
        return settings

    @model_validator(mode="after")
    def _engine_settings_have_an_effect(self) -> SamplingConfig:
        if self.engine_memory is not None and self.engine != "vllm":
            raise ValueError("`engine_memory` together with `engine: vllm`")
        is_cut = self.top_p < 1 or self.top_k is not None
        if self.engine == "vllm" and is_cut and self.temperature != 1:
            # It tells log-probabilities of all tokens, or at the temperature, not both.
            raise ValueError("`top_p` and `top_k` left out, or temperature 1, with `engine: vllm`")
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        highest = 1 + (self.clip_high if self.clip_high != "auto" else USUAL_CLIP)
        if self.ratio_cap is not None and self.ratio_cap <= highest:
            raise ValueError("`ratio_cap` above 1 + `clip_high`")
        return self

    def num_at_once(self, device_kind: str) -> int:
        """Answers in one batch."""
        if self.answers_at_once != "auto":
            return self.answers_at_once
        return 64 if device_kind == "cpu" else 256

    @property
    def reference(self) -> bool:
        """Whether it asks what the model was before training."""
        return self.kl_weight != 0

    @property
    def steps_per_sampling(self) -> int:
        """Optimizer steps that learn from the same answers."""
        return self.updates * self.mini_batches


GroupName = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]


class GroupConfig(SamplingConfig):
    """Answers compared with others to the same prompt: GRPO and its relatives."""

    name: GroupName
    answers: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt, which are compared with each other."""
    scale: Auto | Literal["group", "batch", "none"] = "auto"
    """What rewards are divided by: their deviation in the group, in the batch, or nothing."""
    averaging: Auto | Literal["answer", "token", "constant"] = "auto"
    """What counts alike: answers, tokens, or tokens over `max_new_tokens`."""
    drop_equal: Auto | bool = "auto"
    """Leave groups out whose rewards are all equal: they teach nothing, but are counted in means.

    DAPO's dynamic sampling without its sampling again: a step may be smaller."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> GroupConfig:
        is_usual = self.scale in ("auto", "none") and self.averaging in ("auto", "answer")
        if self.name == "rloo" and not is_usual:
            raise ValueError(
                "`scale` and `averaging` left out: rloo subtracts the mean of the others, and "
                "its loss is that of whole answers"
            )
        if self.name == "rloo" and self.drop_equal is True:
            raise ValueError("`drop_equal` left out: with rloo the divergence tells answers apart")
        return self


class PpoConfig(SamplingConfig):
    """PPO: a value head says at each token what reward is to be expected."""

    name: Literal["ppo"]
    updates: PositiveInt = 4
    """Passes over the sampled answers before new ones are sampled."""
    value_weight: NotNegative = 0.1
    """Weight of the value head's loss."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """How far a value may move before it is no longer pulled on."""
    discount: Share = 1.0
    """Of later rewards (gamma)."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of later surprises in advantages (lambda of GAE)."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Adapt `kl_weight` so that an answer's divergence stays about here (arXiv 1909.08593, 6
    there); null keeps the weight."""
    kl_horizon: PositiveInt = 10_000
    """So many answers make up the time scale of that."""

    @model_validator(mode="after")
    def _target_has_a_weight(self) -> PpoConfig:
        if self.kl_target is not None and self.kl_weight == 0:
            raise ValueError("`kl_target` with a `kl_weight` above 0, which it adapts")
        return self


PRESETS: dict[str, dict[str, object]] = {
    # arXiv 2402.03300 §4.2
    "grpo": {"kl_weight": 0.04, "scale": "group", "averaging": "answer", "drop_equal": False},
    # arXiv 2503.20783
    "dr_grpo": {"kl_weight": 0.0, "scale": "none", "averaging": "constant", "drop_equal": False},
    # arXiv 2503.14476 §4.1
    "dapo": {
        "kl_weight": 0.0,
        "scale": "group",
        "averaging": "token",
        "drop_equal": True,
        "clip_high": 0.28,
    },
    # arXiv 2507.18071 §5.1: the ratios of whole answers differ less than those of tokens
    "gspo": {
        "kl_weight": 0.0,
        "scale": "group",
        "averaging": "answer",
        "drop_equal": False,
        "clip": 3e-4,
        "clip_high": 4e-4,
    },
    # arXiv 2402.14740 §3.1: the divergence is part of the reward
    "rloo": {"kl_weight": 0.05, "scale": "none", "averaging": "answer", "drop_equal": False},
    # arXiv 2203.02155 §C.4
    "ppo": {"kl_weight": 0.02},
}
"""What `auto` becomes."""


def policy_presets(config: GroupConfig | PpoConfig) -> dict[str, object]:
    """What `auto` becomes in each field that may be."""
    preset = {"clip": USUAL_CLIP, "clip_high": USUAL_CLIP, **PRESETS[config.name]}
    return preset if config.clip == "auto" else {**preset, "clip_high": config.clip}
