"""Chooses, from plain numbers, how many tokens go through the model at once and what is recomputed.

With packing there is no padding, so the peak of a step is linear in its tokens T:

    peak(T) = static + T * (sum of what layers keep + the rest) + max(head(T), T * working)

What layers keep depends on what their backward makes again (`Level`). The levels form a ladder,
and a rung of it is "the first m layers at one level, the others one level lighter", so that memory
falls in small steps. A LoRA step has 4 operations a weight and token. Gate and up made again add 54
% of a forward's products in an 8B model, 27 % of a step; a whole layer made again 37 to 50 %, less
where attention's output is kept, which counts in long sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["none", "mlp", "attention", "full", "offload"]
"""What a layer's backward makes again: nothing but norms, gate and up too, all but attention, all,
all from a copy in the host's memory."""

LEVELS: tuple[Level, ...] = ("none", "mlp", "attention", "full", "offload")

EXTRA_TIME: Mapping[Level, float] = {
    "none": 0.0,
    "mlp": 0.27,
    "attention": 0.37,
    "full": 0.45,
    "offload": 0.47,
}
"""Share of a LoRA step's time that a level adds if all layers are at it."""

SAFE_SHARE = 0.9
"""Of the memory: the rest is for what the allocator holds back and the error of the prediction."""

MOST_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""More tokens at once no longer make the products faster; a CPU also loses its caches."""

ENOUGH_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": 4096}
"""From these on products are near their best speed (on a CPU, 256 tokens took 46 % more time each
than 2,048, 1,300 took 7 %). To recompute a layer in order to get beyond costs more than that, so
fewer tokens are taken first."""

STEP_TOKENS = 256
"""Budgets are multiples of it: a few bytes more or less of memory then change nothing."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that training takes.

    Args:
        weight_bytes: of the model.
        optimizer_bytes: moments, gradients, and the adapters' own weights.
        other_bytes: of the process: libraries, data, buffers.
        layers: of one layer and token, by level; levels that a model cannot do are absent.
        num_layers: that keep something for the backward.
        rest: of a token, outside layers.
        working: of a token, while the backward of a layer runs that kept everything.
        head_bytes: while the head runs, beside its rows.
        head_per_token: while it runs, for each of its rows.
        head_most: of all rows together: more of them go through in parts.
        holes: share that the allocator loses between tensors.
        apart_bytes: of other work, between steps, when nothing is kept for a backward.
    """

    weight_bytes: int
    optimizer_bytes: int
    other_bytes: int
    layers: Mapping[Level, float]
    num_layers: int
    rest: float = 0.0
    working: float = 0.0
    head_bytes: int = 0
    head_per_token: float = 0.0
    head_most: int = 0
    holes: float = 0.0
    apart_bytes: int = 0

    @property
    def static_bytes(self) -> int:
        """What does not depend on the tokens."""
        return self.weight_bytes + self.optimizer_bytes + self.other_bytes

    def kept_per_token(self, levels: tuple[Level, ...]) -> float:
        """Bytes kept for the backward by all layers and the rest."""
        return self.rest + sum(self.layers[level] for level in levels)

    def working_per_token(self, levels: tuple[Level, ...]) -> float:
        """Bytes while one layer's backward runs, with what that layer makes again."""
        again = (self.layers["none"] - self.layers[level] for level in set(levels))
        return self.working + max(again, default=0.0)

    def peak_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """The peak of a step of so many tokens."""
        head = self.head_bytes + min(self.head_most, tokens * self.head_per_token)
        most = max(head, tokens * self.working_per_token(levels))
        moving = tokens * self.kept_per_token(levels) + most
        return round(self.static_bytes + max((1 + self.holes) * moving, self.apart_bytes))

    def tokens_in(self, memory_bytes: int, levels: tuple[Level, ...]) -> int:
        """The most tokens whose peak is within a memory; 0 if not even one is."""
        free = (memory_bytes - self.static_bytes) / (1 + self.holes)
        kept = self.kept_per_token(levels)
        if free <= 0:
            return 0
        free_of_head = free - self.head_bytes
        with_head = max(
            (free_of_head - self.head_most) / max(kept, 1.0),
            free_of_head / max(kept + self.head_per_token, 1.0),
        )
        with_backward = free / max(kept + self.working_per_token(levels), 1.0)
        return max(0, int(min(with_head, with_backward)))


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a plan.

    Args:
        device_kind: cpu, cuda or mps.
        memory_bytes: of the device.
        longest_tokens: of a sample: it must go through in one piece.
        step_tokens: of the largest optimizer step, None if unknown: more never come together.
        tokens: at once, None to choose.
        checkpointing: a level, None to choose.
        checkpointed_layers: at that level, None for all.
    """

    device_kind: str
    memory_bytes: int
    longest_tokens: int
    step_tokens: int | None = None
    tokens: int | None = None
    checkpointing: Level | None = None
    checkpointed_layers: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step fits into memory.

    Args:
        micro_batch_tokens: tokens at once.
        levels: of each layer that keeps something, the first ones first.
        predicted_bytes: the peak.
        memory_bytes: of the device.
        reasons: why, in words, by the recipe's keys.
    """

    micro_batch_tokens: int
    levels: tuple[Level, ...]
    predicted_bytes: int
    memory_bytes: int
    reasons: Mapping[str, str]

    @property
    def level(self) -> Level:
        """The deepest level of any layer."""
        return LEVELS[max((LEVELS.index(level) for level in self.levels), default=0)]

    @property
    def num_deepest(self) -> int:
        """Layers at that level."""
        return self.levels.count(self.level)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the safe share of the memory."""
        return self.predicted_bytes <= SAFE_SHARE * self.memory_bytes


def plan_memory(needs: Needs, wish: Wish) -> Plan:
    """Takes the cheapest rung of the ladder on which enough tokens fit, and the tokens that do.

    If nothing fits, the deepest rung is taken with as many tokens as the longest sample needs; the
    caller warns (`Plan.fits`).
    """
    limit = int(SAFE_SHARE * wish.memory_bytes)
    most = max(wish.longest_tokens, MOST_TOKENS.get(wish.device_kind, MOST_TOKENS["cuda"]))
    enough = max(wish.longest_tokens, ENOUGH_TOKENS.get(wish.device_kind, most))
    come = wish.step_tokens or most
    wanted = min(enough if wish.tokens is None else wish.tokens, max(come, wish.longest_tokens))
    rungs = _rungs(needs, wish)
    levels = next((r for r in rungs if needs.tokens_in(limit, r) >= wanted), rungs[-1])
    fitting = needs.tokens_in(limit, levels)
    tokens = wish.tokens
    if tokens is None:
        tokens = max(wish.longest_tokens, min(most, fitting // STEP_TOKENS * STEP_TOKENS))
    predicted = needs.peak_bytes(min(tokens, come) if wish.step_tokens else tokens, levels)
    plan = Plan(tokens, levels, predicted, wish.memory_bytes, {})
    return Plan(tokens, levels, predicted, wish.memory_bytes, _reasons(plan, wish, most, fitting))


def rung(
    level: Level, count: int, num_layers: int, possible: Sequence[Level] = LEVELS
) -> tuple[Level, ...]:
    """The first layers at a level, the others one level lighter of those that are possible."""
    count = min(count, num_layers)
    lighter = possible[max(0, possible.index(level) - 1)]
    return (level,) * count + (lighter,) * (num_layers - count)


def _rungs(needs: Needs, wish: Wish) -> list[tuple[Level, ...]]:
    """The rungs to choose from, cheapest first."""
    layers = needs.num_layers
    possible: list[Level] = [level for level in LEVELS if level in needs.layers]
    if wish.checkpointing is None:
        counts = range(1, layers + 1)
        deeper = [rung(level, m, layers, possible) for level in possible[1:] for m in counts]
        return [rung("none", layers, layers, possible), *deeper]
    level = wish.checkpointing
    if level not in possible:  # `offload` where the device's memory is the host's, `mlp` elsewhere
        level = possible[-1]
    count = layers if wish.checkpointed_layers is None else wish.checkpointed_layers
    return [rung(level, count, layers, possible)]


def _reasons(plan: Plan, wish: Wish, most: int, fitting: int) -> dict[str, str]:
    gib, total = plan.predicted_bytes / 2**30, plan.memory_bytes / 2**30
    room = f"at most {gib:.2f} of {total:.1f} GiB of memory"
    if not plan.fits:
        why = f"{room}: may not fit, the longest sample has {wish.longest_tokens:,} tokens"
    elif plan.micro_batch_tokens >= most:
        why = f"{room}; more at once is no faster on this {wish.device_kind}"
    else:
        why = f"{room}; {fitting:,} would fill {SAFE_SHARE:.0%} of it"
    level = plan.level
    if level == "none":
        again = "all that the backward needs fits into memory"
    else:
        slower = sum(EXTRA_TIME[each] for each in plan.levels) / max(len(plan.levels), 1)
        again = f"to fit, {plan.num_deepest} of {len(plan.levels)} layers; a step takes "
        again += f"about {slower:.0%} longer"
    return {
        "train.micro_batch_tokens": why,
        "train.checkpointing": again,
        "train.checkpointed_layers": again if level != "none" else "there are none",
    }


# Compiling


COMPILE_SECONDS = 45.0
"""Time that compiling the kernels takes without a cache, on two cores; 7 s with one."""
COMPILED_SPEEDUP = 1.12
"""How much faster a step is with compiled kernels: SmolLM2-135M, LoRA, bfloat16, two AMX cores."""
WORTH_SECONDS = 900.0
"""Runs longer than this are compiled: 45 s of compiling is then won back twice."""


def choose_compile(estimated_seconds: float, compiler: str | None) -> tuple[str, str]:
    """Whether compiling pays: (off or kernels, why).

    Args:
        estimated_seconds: of the whole training without it.
        compiler: what would compile, None if there is none.
    """
    count = max(1, round(estimated_seconds / 60))
    minutes = f"about {count:,} minute{'s' * (count > 1)} of training"
    if estimated_seconds < WORTH_SECONDS:
        return "off", f"{minutes} would win back too little of the compiling (up to a minute)"
    if compiler is None:
        return "off", f"{minutes} would gain, but no compiler is here (g++, clang; triton on CUDA)"
    return "kernels", f"{minutes}, {compiler} is here: about {COMPILED_SPEEDUP:g} times as fast"
