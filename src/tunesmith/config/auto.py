"""Fills in every `auto` of a recipe from plain facts, with the reason for each value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from tunesmith.config.budget import Needs, Plan, Wish, choose_compile, plan_memory
from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.method import AdapterConfig, auto_alpha, base_learning_rate
from tunesmith.config.objective import PreferenceConfig, RatedConfig
from tunesmith.config.policy import GroupConfig, PpoConfig, SamplingConfig, policy_presets
from tunesmith.config.recipe import LoraConfig, Recipe

AUTO_KEYS = (
    "model.dtype",
    "data.validation",
    "data.max_length",
    "method.rank",
    "method.alpha",
    "train.epochs",
    "train.global_batch",
    "train.micro_batch_tokens",
    "train.checkpointing",
    "train.checkpointed_layers",
    "train.compile",
    "train.learning_rate",
    "checkpoint.every_steps",
    "checkpoint.background",
    "guard.spike_sigma",
)

OBJECTIVE_KEYS = (
    "objective.beta",
    "objective.margin",
    "objective.labels",
    *(f"objective.{name}" for name in ("clip", "clip_high", "kl_weight", "scale", "averaging")),
    "objective.drop_equal",
)
"""What only some objectives leave open."""

TEXT_TOKENS = 2048
"""Raw text is cut into pieces of at most so many tokens."""

EPOCHS_BY_ROWS = ((100, 15), (1_000, 10), (10_000, 2), (100_000, 1))
"""The rule of thumb of the Chinese SFT guides: small data wants many passes."""


RULE_RATES = {
    "lion": (1 / 10, "; a tenth of AdamW's, for lion moves every number by all of it"),
    "adafactor": (10, "; ten times AdamW's: adafactor's is a share of the weights' size"),
    "sgd": (1000, "; a thousand times AdamW's: sgd does not divide gradients by their size"),
}
"""Learning rates over AdamW's, and why; the update of other rules is as large as AdamW's."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the values depend on, without torch."""

    num_rows: int
    longest_tokens: int
    """Of samples with answers; raw text is cut into pieces anyway."""
    context_tokens: int
    hidden_size: int
    device_kind: str
    has_fast_bf16: bool
    memory_bytes: int
    """Of the device."""
    needs: Needs
    """What training takes of it."""
    longest_samples: tuple[int, ...] = ()
    """Tokens of the longest samples, sorted; the others are no longer than the last of these."""
    tokens_per_row: float = 0.0
    """Of samples to train on, on average."""
    seconds_per_token: float = 0.0
    """Of training, roughly."""
    compiler: str | None = None
    """What would compile kernels."""
    longest_text_tokens: int = 0
    """Of samples of raw text."""
    has_validation: bool = False
    """Whether the data brings validation rows of its own."""
    draws_per_row: float = 1.0
    """Samples of an epoch for each row: sources may have weights or counts."""
    labels: tuple[str, ...] = ()
    """Of data to classify."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe without any `auto`, and why each of them became what it is."""

    recipe: Recipe
    reasons: dict[str, str]
    plan: Plan
    """How its steps fit into memory."""


def number(value: int | str) -> int:
    """A resolved whole number.

    Raises:
        ValueError: it is still `auto`: the recipe was not resolved.
    """
    if isinstance(value, str):
        raise ValueError(f"an unresolved value: {value}")
    return value


def resolve(recipe: Recipe, facts: Facts) -> Resolved:
    """Replaces every `auto`; values given by the user stay."""
    values = recipe.model_dump(mode="json")
    reasons: dict[str, str] = {}

    def fill(key: str, value: object, reason: str) -> object:
        section, name = key.split(".")
        if values[section].get(name) == "auto":
            values[section][name] = value
            reasons[key] = reason
        return values[section].get(name)

    fill("model.dtype", *_dtype(facts))
    fill("data.max_length", *_max_length(recipe, facts))
    held_out = fill("data.validation", *_validation(facts))
    num_train = facts.num_rows - _count(held_out, facts.num_rows)
    num_train = max(1, round(num_train * facts.draws_per_row))
    if isinstance(recipe.method, LoraConfig):
        rank = fill("method.rank", 16, "enough for a task of one's own; 8 to 64 differ little")
        fill("method.alpha", *auto_alpha(recipe.method, int(str(rank))))
    if isinstance(recipe.objective, PreferenceConfig):
        fill("objective.beta", *_beta(recipe.objective))
        fill("objective.margin", *_margin(recipe.objective))
    if isinstance(recipe.objective, ClassifyConfig):
        fill("objective.labels", list(facts.labels), "those of the data")
    if isinstance(recipe.objective, GroupConfig | PpoConfig):
        for name, value in policy_presets(recipe.objective).items():
            fill(f"objective.{name}", value, f"as the authors of {recipe.objective.name} take")
    is_policy = isinstance(recipe.objective, SamplingConfig)
    spikes = (
        (None, "losses of policies have no level")
        if is_policy
        else (6.0, "what samples differ by is less")
    )
    fill("guard.spike_sigma", *spikes)
    fill("train.epochs", *auto_epochs(num_train))
    # One answer alone says nothing of a group's mean reward, nor of the KL that KTO estimates.
    is_compared = is_policy or recipe.objective.name == "kto"
    batch = fill("train.global_batch", *_global_batch(num_train, least=8 if is_compared else 1))
    fill("train.learning_rate", *_learning_rate(recipe, facts))
    longest = int(values["data"]["max_length"])
    step_tokens = _step_tokens(facts.longest_samples, int(str(batch)), longest)
    plan = make_plan(recipe, facts, longest, step_tokens)
    for key, value in plan_values(plan).items():
        fill(key, value, plan.reasons[key])
    steps = values["train"]["max_steps"] or (
        math.ceil(num_train / int(str(batch))) * values["train"]["epochs"]
    )
    tokens = steps * int(str(batch)) * facts.tokens_per_row
    fill("train.compile", *choose_compile(tokens * facts.seconds_per_token, facts.compiler))
    every = min(500, max(1, math.ceil(steps / 10)))
    fill("checkpoint.every_steps", every, "ten times in the run, at least every 500 steps")
    fill("checkpoint.background", *_background(facts))
    return Resolved(Recipe.model_validate(values), reasons, plan)


def _step_tokens(lengths: tuple[int, ...], batch: int, max_length: int) -> int | None:
    """Tokens of the longest samples that a step could have."""
    if not lengths:
        return None
    chosen = [min(length, max_length) for length in lengths[:batch]]
    return sum(chosen) + (batch - len(chosen)) * chosen[-1]


def make_plan(recipe: Recipe, facts: Facts, max_length: int, step_tokens: int | None) -> Plan:
    """Fits the steps into memory; what the recipe says about them stays."""
    train = recipe.train
    tokens, level, layers = train.micro_batch_tokens, train.checkpointing, train.checkpointed_layers
    wish = Wish(
        device_kind=facts.device_kind,
        memory_bytes=facts.memory_bytes,
        longest_tokens=min(max(facts.longest_tokens, facts.longest_text_tokens), max_length),
        step_tokens=step_tokens,
        tokens=None if tokens == "auto" else tokens,
        checkpointing=None if level == "auto" else level,
        checkpointed_layers=None if layers == "auto" else layers,
    )
    return plan_memory(facts.needs, wish)


def plan_values(plan: Plan) -> dict[str, str | int]:
    """A plan as the recipe's values."""
    return {
        "train.micro_batch_tokens": plan.micro_batch_tokens,
        "train.checkpointing": plan.level,
        "train.checkpointed_layers": plan.num_deepest if plan.level != "none" else 0,
    }


def _beta(objective: PreferenceConfig) -> tuple[float, str]:
    if objective.name == "simpo":
        return 2.0, "as SimPO's authors take for instruct models"
    return 0.1, f"usual for {objective.name}"


def _margin(objective: PreferenceConfig) -> tuple[float, str]:
    if objective.name == "simpo":
        return 1.0, "half of beta, as SimPO's authors advise"
    return 0.0, f"{objective.name} has none"


def _background(facts: Facts) -> tuple[bool, str]:
    # Gradients are not saved, but full tuning saves the weights themselves, of about their size.
    copied, room = facts.needs.optimizer_bytes, facts.memory_bytes // 16
    sizes = f"about {copied / 2**20:,.0f} MiB; up to {room / 2**20:,.0f} are spent on it"
    return copied <= room, f"a copy of what is saved takes {sizes}"


def _dtype(facts: Facts) -> tuple[str, str]:
    if facts.has_fast_bf16:
        return "bfloat16", f"this {facts.device_kind} computes bfloat16 fast"
    return "float32", f"bfloat16 is slow or absent on this {facts.device_kind}"


def _max_length(recipe: Recipe, facts: Facts) -> tuple[int, str]:
    text, longest = facts.longest_text_tokens, facts.longest_tokens
    if isinstance(recipe.objective, SamplingConfig):
        room = facts.context_tokens - recipe.objective.max_new_tokens
        return max(8, min(longest, room)), "the longest prompt that leaves room for its answer"
    if recipe.data.overlong in ("auto", "split"):
        text = min(text, TEXT_TOKENS, facts.context_tokens)
        if longest < text:
            return max(8, text), "pieces of raw text"
    longest = max(longest, text)
    if longest <= facts.context_tokens:
        return max(8, longest), "the longest sample"
    return facts.context_tokens, f"the model's context; the longest is {longest}"


def _validation(facts: Facts) -> tuple[int, str]:
    if facts.has_validation:
        return 0, "the data has a validation split of its own"
    if facts.num_rows < 10:
        return 0, f"{facts.num_rows} rows are too few to hold any out"
    count = min(1000, max(1, round(0.1 * facts.num_rows)))
    return count, "10 % of the rows, at most 1,000"


def _count(held_out: object, num_rows: int) -> int:
    if isinstance(held_out, float):
        return max(1, round(held_out * num_rows))
    return min(held_out, num_rows - 1) if isinstance(held_out, int) else 0


def auto_epochs(num_train: int) -> tuple[int, str]:
    """Interpolates EPOCHS_BY_ROWS in the logarithm of the rows."""
    points = EPOCHS_BY_ROWS
    rows = min(max(num_train, points[0][0]), points[-1][0])
    (low, more), (high, less) = next(pair for pair in pairwise(points) if rows <= pair[1][0])
    share = math.log(rows / low) / math.log(high / low)
    epochs = round(more + share * (less - more))
    return epochs, f"{num_train:,} rows; the best checkpoint is kept"


def _global_batch(num_train: int, *, least: int = 1) -> tuple[int, str]:
    least = min(least, num_train)
    return min(256, max(least, round(0.002 * num_train))), f"0.2 % of the rows, {least} to 256"


def _learning_rate(recipe: Recipe, facts: Facts) -> tuple[float, str]:
    """Narrow models want more than wide ones."""
    method = recipe.method
    name = method.kind if isinstance(method, AdapterConfig) else method.name
    wish = f"{name} on a model {facts.hidden_size} wide"
    rate = base_learning_rate(method) * math.sqrt(2048 / facts.hidden_size)
    is_policy = isinstance(recipe.objective, SamplingConfig)
    if isinstance(recipe.objective, PreferenceConfig | RatedConfig):
        rate, wish = rate / 10, f"{wish}; a tenth, for preferences"
    elif is_policy:
        rate, wish = rate / 10, f"{wish}; a tenth, for answers of its own"
    elif isinstance(recipe.objective, RewardConfig):
        rate, wish = rate / 2, f"{wish}; half, for scores that a few pairs soon tell apart"
    factor, because = RULE_RATES.get(recipe.train.optimizer.name, (1, ""))
    rate, wish = rate * factor, wish + because
    digits = 1 - math.floor(math.log10(rate))
    return round(rate, digits), wish
