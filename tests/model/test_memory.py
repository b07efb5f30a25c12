"""Predicted bytes against counted ones, on tiny models."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch

from conftest import make_tiny_config
from tunesmith.config.budget import Level, Needs
from tunesmith.config.recipe import LoraConfig, Recipe
from tunesmith.model.adapters import attach
from tunesmith.model.fast_path import install_layers, set_levels
from tunesmith.model.load import random_model
from tunesmith.model.memory import (
    LiveBytes,
    Sizes,
    StepBytes,
    estimate_needs,
    kept_per_token,
    measure_config,
    measure_step,
    refine_needs,
)
from tunesmith.types import Segments

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}
LORA = LoraConfig(rank=4, alpha=8.0)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": "d", **sections})


def tiny(*, is_bf16: bool, is_fast: bool = True, method: Any = LORA) -> tuple[Any, Sizes]:
    config = make_tiny_config(**SHAPE)
    model = attach(random_model(config, is_bf16=is_bf16), method).train()
    if is_fast:
        install_layers(model)
    return model, measure_config(make_tiny_config(**SHAPE), method)


def forward_of(model: Any, *, is_bf16: bool) -> Callable[[int], torch.Tensor]:
    def forward(num_tokens: int) -> torch.Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            out = base.get_decoder()(
                input_ids=torch.ones(1, num_tokens, dtype=torch.long),
                position_ids=torch.arange(num_tokens)[None],
                use_cache=False,
                segments=Segments((num_tokens,)),
            )
        return out.last_hidden_state[0, -1].float().sum()

    return forward


def slope(model: Any, *, is_bf16: bool) -> tuple[float, float]:
    """Bytes per token kept at the backward's beginning, and at the peak."""
    forward = forward_of(model, is_bf16=is_bf16)
    measure_step(forward, 64, CPU)  # the first step makes gradients and what is cached
    first, second = (measure_step(forward, n, CPU) for n in (64, 192))
    return (second.kept - first.kept) / 128, (second.peak - first.peak) / 128


def test_live_bytes_are_those_of_living_tensors() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100)
        assert live.now == 4000
        c = b + 1
        assert live.now == 8000
        del a, b
        assert live.now == 4000
        c.add_(1)
        del c
        assert (live.now, live.peak) == (0, 8000)
        given = torch.ones(10, dtype=torch.float64)
    before = torch.ones(50)
    with LiveBytes() as live:
        view = before[10:]
        assert live.now == 0
        view = view * given[0]
        assert live.now == 160


@pytest.mark.parametrize("is_bf16", [True, False])
@pytest.mark.parametrize("level", ["none", "mlp", "attention", "full"])
def test_what_our_layers_keep(
    is_bf16: bool, level: Literal["none", "mlp", "attention", "full"]
) -> None:
    model, sizes = tiny(is_bf16=is_bf16)
    assert sizes.is_known
    set_levels(model, [level] * 4)
    kept, peak = slope(model, is_bf16=is_bf16)
    predicted = kept_per_token(sizes, 2 if is_bf16 else 4)
    needs = estimate_needs(sizes, recipe(), is_bf16=is_bf16)
    expected = 4 * predicted[level]
    assert expected <= kept + 200 <= expected + needs.rest + 400
    # Elementwise chains in bfloat16 work in fp32, on tiles of rows; here one tile is everything.
    wide = 24 * SHAPE["intermediate_size"] if is_bf16 else 0
    assert peak <= 1.1 * (kept + needs.working + predicted["none"] + wide)


def test_each_level_keeps_less() -> None:
    model, sizes = tiny(is_bf16=False)
    predicted, kept = kept_per_token(sizes, 4), list[float]()
    levels: tuple[Level, ...] = ("none", "mlp", "attention", "full")
    forward = forward_of(model, is_bf16=False)
    measure_step(forward, 16, CPU)
    for level in levels:
        set_levels(model, [level] * 4)
        kept.append(measure_step(forward, 128, CPU).kept / 128)
    saved = [4 * (predicted[one] - predicted[other]) for one, other in pairwise(levels)]
    # Logarithms are counted for heads of 64; here heads have 16.
    assert [more - less for more, less in pairwise(kept)] == pytest.approx(saved, abs=4 * 12)
    assert min(saved) > 1000


def test_kept_attention_gets_free_as_the_backward_goes_on() -> None:
    """At the peak one layer is whole and the layers before it keep two rows a token."""
    model, sizes = tiny(is_bf16=False)
    set_levels(model, ["attention"] * 4)
    kept, peak = slope(model, is_bf16=False)
    needs = estimate_needs(sizes, recipe(), is_bf16=False)
    assert peak == pytest.approx(kept + needs.working_per_token(("attention",) * 4), rel=0.1)
    kinds: list[tuple[int, int]] = []
    for _ in range(2):
        with LiveBytes() as live:
            loss = forward_of(model, is_bf16=False)(64)
            before = live.now
            loss.backward()
            del loss
        kinds.append((before, live.now))
    assert kinds[1][1] < kinds[1][0] / 10


@pytest.mark.parametrize("is_bf16", [True, False])
def test_what_transformers_layers_keep(is_bf16: bool) -> None:
    model, sizes = tiny(is_bf16=is_bf16, is_fast=False)
    kept, _ = slope(model, is_bf16=is_bf16)
    unknown = Sizes(
        **{name: getattr(sizes, name) for name in Sizes.__slots__} | {"is_known": False}
    )
    predicted = kept_per_token(unknown, 2 if is_bf16 else 4)
    assert set(predicted) == {"none"}
    assert kept == pytest.approx(4 * predicted["none"], rel=0.35)


def test_dropout_makes_layers_unknown() -> None:
    sizes = measure_config(make_tiny_config(), LoraConfig(rank=4, alpha=8.0, dropout=0.1))
    assert sizes.is_known is False


def test_sizes() -> None:
    sizes = measure_config(make_tiny_config(), LORA)
    assert (sizes.query_size, sizes.key_size, sizes.adapter_ranks) == (32, 16, 28)
    assert sizes.trained_layers == sizes.num_layers == 2
    assert sizes.num_linear == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    upper = measure_config(make_tiny_config(), LoraConfig(rank=4, alpha=8.0, layers=1))
    assert (upper.trained_layers, upper.num_layers) == (1, 2)


def test_static_memory_by_method() -> None:
    config = make_tiny_config()
    lora, full = (measure_config(config, recipe(method=name).method) for name in ("lora", "full"))
    in_bf16 = estimate_needs(lora, recipe(), is_bf16=True)
    assert in_bf16.weight_bytes == 2 * lora.num_parameters
    assert in_bf16.optimizer_bytes == 16 * lora.num_trained
    all_of_it = estimate_needs(full, recipe(method="full"), is_bf16=True)
    assert all_of_it.weight_bytes == 2 * full.num_parameters
    assert all_of_it.optimizer_bytes == 16 * full.num_parameters  # 4 gradient, 4 master, 8 moments
    in_fp32 = estimate_needs(full, recipe(method="full"), is_bf16=False)
    assert in_fp32.weight_bytes + in_fp32.optimizer_bytes == 16 * full.num_parameters
    assert all_of_it.head_bytes > in_bf16.head_bytes
    small = recipe(method="full", train={"optimizer": "adamw_8bit_sr"})
    assert estimate_needs(full, small, is_bf16=True).optimizer_bytes < 5 * full.num_parameters
    nf4 = recipe(model={"id": "m", "quantize": "nf4"})
    saved = in_bf16.weight_bytes - estimate_needs(lora, nf4, is_bf16=True).weight_bytes
    assert saved == pytest.approx(1.48 * lora.num_linear, rel=0.01)
    int8 = recipe(model={"id": "m", "quantize": "int8"})
    saved = in_bf16.weight_bytes - estimate_needs(lora, int8, is_bf16=True).weight_bytes
    assert saved == pytest.approx(lora.num_linear, rel=0.01)


def test_only_a_gpu_offloads() -> None:
    sizes = measure_config(make_tiny_config(), LORA)
    assert "offload" not in estimate_needs(sizes, recipe(), is_bf16=True).layers
    on_gpu = estimate_needs(sizes, recipe(), is_bf16=True, device_kind="cuda")
    assert on_gpu.layers["offload"] == 0


NEEDS = Needs(1000, 100, 10, {"none": 100.0, "mlp": 40.0}, num_layers=3, rest=20.0, working=7.0)


def test_two_steps_make_a_line() -> None:
    def measure(tokens: int) -> StepBytes:
        return StepBytes(kept=5000 + 470 * tokens, peak=6000 + 500 * tokens)

    needs = refine_needs(NEEDS, measure, (192, 64))
    assert needs.kept_per_token(("none",) * 3) == pytest.approx(470)
    assert needs.working == pytest.approx(30)
    assert needs.layers["mlp"] / needs.layers["none"] == pytest.approx(0.4)
    assert needs.static_bytes == NEEDS.static_bytes


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_large_step_is_predicted_from_two_small_ones(is_fast: bool) -> None:
    model, sizes = tiny(is_bf16=False, is_fast=is_fast)
    forward = forward_of(model, is_bf16=False)
    measure_step(forward, 16, CPU)
    before = estimate_needs(sizes, recipe(), is_bf16=False)
    needs = refine_needs(before, lambda n: measure_step(forward, n, CPU), (32, 96))
    found = measure_step(forward, 800, CPU)
    levels = ("none",) * 4
    # There is no head here, and counting sees no holes.
    needs = replace(needs, head_bytes=0, head_most=0, holes=0.0)
    predicted = needs.peak_bytes(800, levels) - needs.static_bytes
    assert predicted == pytest.approx(found.peak, rel=0.02)
