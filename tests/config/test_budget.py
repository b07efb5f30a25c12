"""The ladder of memory: the cheapest rung first, as many tokens as fit, no false promises."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.budget import (
    COMPILE_SECONDS,
    COMPILED_SPEEDUP,
    LEVELS,
    SAFE_SHARE,
    WORTH_SECONDS,
    Level,
    Needs,
    Wish,
    choose_compile,
    plan_memory,
    rung,
)

GIB = 2**30

# Llama 3.1 8B in bfloat16 with LoRA, per layer and token.
NEEDS = Needs(
    weight_bytes=16 * GIB,
    optimizer_bytes=GIB // 2,
    other_bytes=GIB // 2,
    layers={"none": 94_000, "mlp": 37_000, "attention": 16_512, "full": 8_192, "offload": 0},
    num_layers=32,
    rest=32_000,
    working=160_000,
    head_bytes=GIB // 16,
    head_per_token=256_000,
    head_most=GIB // 16,
    holes=0.05,
)

WISH = Wish("cuda", 80 * GIB, longest_tokens=2048)


def test_a_large_card_recomputes_nothing() -> None:
    plan = plan_memory(NEEDS, WISH)
    assert plan.micro_batch_tokens == 16384
    assert set(plan.levels) == {"none"}
    assert plan.fits
    assert "no faster" in plan.reasons["train.micro_batch_tokens"]


def test_fewer_tokens_come_before_recomputing() -> None:
    plan = plan_memory(NEEDS, replace(WISH, memory_bytes=40 * GIB))
    assert set(plan.levels) == {"none"}
    assert 4096 <= plan.micro_batch_tokens < 16384
    assert plan.micro_batch_tokens % 256 == 0
    assert "would fill 90%" in plan.reasons["train.micro_batch_tokens"]


def test_then_some_layers_are_recomputed() -> None:
    plan = plan_memory(NEEDS, replace(WISH, memory_bytes=28 * GIB))
    assert plan.level == "mlp"
    assert 0 < plan.num_deepest < 32
    assert plan.levels[0] == "mlp"
    assert plan.levels[-1] == "none"
    assert plan.micro_batch_tokens >= 4096
    assert f"{plan.num_deepest} of 32 layers" in plan.reasons["train.checkpointing"]


def test_no_rung_is_deeper_than_it_must() -> None:
    for gib in range(20, 60):
        wish = replace(WISH, memory_bytes=gib * GIB)
        plan = plan_memory(NEEDS, wish)
        if plan.level == "none" or not plan.fits:
            continue
        fewer = plan.num_deepest - 1
        lighter = rung(plan.level, fewer, 32) if fewer else rung(plan.levels[-1], 32, 32)
        assert NEEDS.tokens_in(int(SAFE_SHARE * wish.memory_bytes), lighter) < 4096


def test_attention_is_kept_before_all_is_made_again() -> None:
    wish = replace(WISH, longest_tokens=16384)
    plans = [
        plan_memory(NEEDS, replace(wish, memory_bytes=n * GIB // 4)) for n in range(360, 0, -1)
    ]
    assert list(dict.fromkeys(plan.level for plan in plans)) == [*LEVELS]
    plan = plan_memory(NEEDS, replace(WISH, checkpointing="attention", checkpointed_layers=5))
    assert plan.levels == ("attention",) * 5 + ("mlp",) * 27


def test_a_long_sample_is_taken_at_any_price() -> None:
    wish = replace(WISH, memory_bytes=24 * GIB, longest_tokens=16384)
    plan = plan_memory(NEEDS, wish)
    assert plan.level == "offload"
    assert plan.micro_batch_tokens == 16384
    assert plan_memory(NEEDS, replace(wish, memory_bytes=10 * GIB)).fits is False


def test_without_memory_the_deepest_rung_and_a_warning() -> None:
    plan = plan_memory(NEEDS, replace(WISH, memory_bytes=0))
    assert plan.micro_batch_tokens == 2048
    assert plan.levels == ("offload",) * 32
    assert "may not fit" in plan.reasons["train.micro_batch_tokens"]


def test_levels_that_a_model_has_not_are_left_out() -> None:
    plain = replace(NEEDS, layers={"none": 94_000})
    plan = plan_memory(plain, replace(WISH, memory_bytes=20 * GIB))
    assert plan.levels == ("none",) * 32
    without_mlp = replace(NEEDS, layers={"none": 94_000, "full": 8_192})
    plan = plan_memory(without_mlp, replace(WISH, memory_bytes=24 * GIB))
    assert set(plan.levels) == {"none", "full"}


@pytest.mark.parametrize("level", LEVELS)
def test_a_given_level_stays(level: Level) -> None:
    plan = plan_memory(NEEDS, replace(WISH, checkpointing=level))
    assert plan.levels == (level,) * 32
    plan = plan_memory(NEEDS, replace(WISH, checkpointing=level, checkpointed_layers=5))
    assert plan.level == level
    assert level == "none" or plan.num_deepest == 5


def test_given_tokens_stay() -> None:
    plan = plan_memory(NEEDS, replace(WISH, tokens=5000))
    assert plan.micro_batch_tokens == 5000
    plan = plan_memory(NEEDS, replace(WISH, tokens=5000, memory_bytes=30 * GIB))
    assert (plan.micro_batch_tokens, plan.level, plan.fits) == (5000, "mlp", True)


def test_rungs_take_less_and_less() -> None:
    counts = range(1, 33)
    rungs = [rung("none", 32, 32), *(rung(level, m, 32) for level in LEVELS[1:] for m in counts)]
    kept = [NEEDS.kept_per_token(levels) for levels in rungs]
    assert all(more > less for more, less in pairwise(kept))


@given(
    memory=st.integers(0, 200) | st.integers(0, 4000),
    longest=st.integers(1, 100_000),
    layers=st.integers(0, 80),
    head=st.integers(0, 4),
    kind=st.sampled_from(["cpu", "cuda", "mps"]),
)
def test_a_plan_that_fits_is_within_the_memory(
    memory: int, longest: int, layers: int, head: int, kind: str
) -> None:
    needs = replace(NEEDS, num_layers=layers, head_most=head * GIB, head_per_token=head * 10**6)
    plan = plan_memory(needs, Wish(kind, memory * GIB, longest))
    assert plan.micro_batch_tokens >= longest
    assert len(plan.levels) == layers
    limit = int(SAFE_SHARE * memory * GIB)
    fits_somehow = needs.tokens_in(limit, rung("offload", layers, layers)) >= longest
    assert plan.fits == fits_somehow
    assert plan.predicted_bytes == needs.peak_bytes(plan.micro_batch_tokens, plan.levels)


def test_compiling_must_pay() -> None:
    assert choose_compile(WORTH_SECONDS - 1, "g++")[0] == "off"
    assert choose_compile(WORTH_SECONDS + 1, "g++")[0] == "kernels"
    kind, why = choose_compile(10 * WORTH_SECONDS, None)
    assert kind == "off"
    assert "no compiler" in why
    gained = WORTH_SECONDS * (1 - 1 / COMPILED_SPEEDUP)
    assert gained > 2 * COMPILE_SECONDS


def test_a_layer_made_again_is_in_memory_once() -> None:
    levels = tuple(["full"] * NEEDS.num_layers)
    again = NEEDS.layers["none"] - NEEDS.layers["full"]
    assert NEEDS.working_per_token(levels) == NEEDS.working + again
    assert NEEDS.working_per_token(tuple(["none"] * NEEDS.num_layers)) == NEEDS.working
