"""AdamW on flat buffers: torch's bits, norms, skipped steps, small states, stochastic rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tunesmith.ops.optim import FlatOptimizer, FlatSettings, flat_norm
from tunesmith.ops.optim_states import (
    BLOCK,
    code_table,
    dequantize,
    dynamic_map,
    quantize,
    round_stochastically,
)
from tunesmith.ops.rules.adamw import AdamWSettings, build_flat_adamw

# Vector lengths on both sides of every register width, and matrices.
SHAPES = [(1,), (3, 1), (7,), (9, 5), (17,), (100, 3), (577,), (64, 64), (1001, 13)]
TRUE = torch.tensor(True)

Named = list[tuple[str, torch.nn.Parameter]]


def build(
    named: Named, settings: dict[str, Any], rate_factors: dict[str, float] | None = None
) -> FlatOptimizer:
    """AdamW with settings of its own and of the buffers."""
    flat = {k: v for k, v in settings.items() if k in ("weight_decay", "keep_master", "seed")}
    own = {k: v for k, v in settings.items() if k not in flat}
    return build_flat_adamw(named, AdamWSettings(**own), FlatSettings(**flat), rate_factors)


def make_parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [(f"p{index}", torch.nn.Parameter(t)) for index, t in enumerate(tensors)]


def give_gradients(named: Named, seed: int, scale: float = 1.0) -> None:
    """Adds to each gradient through autograd, as a micro-batch does."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        wanted = torch.randn(parameter.shape, generator=generator) * scale
        (parameter * wanted.to(parameter.dtype)).sum().backward()


def torch_adamw(named: Named, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for _, p in named if p.dim() > 1]
    vectors = [p for _, p in named if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def step_both(ours: FlatOptimizer, theirs: torch.optim.AdamW, rate: float) -> None:
    for group in theirs.param_groups:
        group["lr"] = rate
    theirs.step()
    theirs.zero_grad()
    ours.step(rate, TRUE)
    ours.zero_grad()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_as_torch_on_separate_parameters(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine, reference = make_parameters(SHAPES), make_parameters(SHAPES)
        ours = build(mine, {"weight_decay": 0.1})
        theirs = torch_adamw(reference, 0.1)
        for step in range(6):
            for named in (mine, reference):
                give_gradients(named, 2 * step, scale=10.0 ** (step - 3))
                give_gradients(named, 2 * step + 1)
            step_both(ours, theirs, 1e-2 / (step + 1))
    finally:
        torch.set_num_threads(before)
    for (name, p), (_, q) in zip(mine, reference, strict=True):
        stored, state = ours.tensors(), theirs.state[q]
        pairs = [(p.detach(), q.detach())]
        pairs += [(stored[f"{name}.{field}"], state[field]) for field in ("exp_avg", "exp_avg_sq")]
        for a, b in pairs:
            # torch computes the last elements of each tensor without vector instructions, which
            # rounds differently: the last bit of the second moment.
            whole = a.numel() // 16 * 16
            assert torch.equal(a.flatten()[:whole], b.flatten()[:whole]), name
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_of_their_own_are_those_of_another_optimizer(dtype: torch.dtype) -> None:
    """LoRA+: some parameters 16 times as fast; each has the bits of a run at its own rate."""
    fast = {"p1": 16.0, "p3": 16.0}
    mine = make_parameters(SHAPES, dtype)
    ours = build(mine, {"weight_decay": 0.1, "states": "float32"}, fast)
    apart: dict[str, torch.Tensor] = {}
    for factor in (1.0, 16.0):
        named = make_parameters(SHAPES, dtype)
        chosen = [(name, p) for name, p in named if fast.get(name, 1.0) == factor]
        other = build(chosen, {"weight_decay": 0.1, "states": "float32"})
        for step in range(4):
            give_gradients(named, step)
            other.step(factor * 1e-3, TRUE)
            other.zero_grad()
        masters = other.tensors()
        apart |= {name: masters.get(f"{name}.master", p.detach()) for name, p in chosen}
    for step in range(4):
        give_gradients(mine, step)
        ours.step(1e-3, TRUE)
        ours.zero_grad()
    masters = ours.tensors()
    for name, p in mine:
        assert torch.equal(masters.get(f"{name}.master", p.detach()), apart[name]), name


def test_a_factor_of_one_changes_nothing() -> None:
    groups = build(make_parameters(SHAPES), {}, {"p1": 1.0}).groups
    assert len(groups) == len(build(make_parameters(SHAPES), {}).groups)


def test_parameters_stay_the_same_objects_and_gradients_the_same_views() -> None:
    named = make_parameters([(4, 3), (5,)])
    before = [(p, p.detach().clone()) for _, p in named]
    ours = build(named, {})
    views = [p.grad for _, p in named]
    give_gradients(named, 0)
    ours.step(0.1, TRUE)
    ours.zero_grad()
    for (_, p), (old, value), view in zip(named, before, views, strict=True):
        assert p is old
        assert p.requires_grad
        assert p.is_leaf
        assert not torch.equal(p, value)
        assert p.grad is view
        assert view is not None
        assert not view.any()
    storages = {p.untyped_storage().data_ptr() for _, p in named if p.dim() > 1}
    assert len(storages) == 1


def test_a_replaced_gradient_is_noticed() -> None:
    named = make_parameters([(4, 3)])
    ours = build(named, {})
    named[0][1].grad = None
    give_gradients(named, 0)
    with pytest.raises(RuntimeError, match="p0"):
        ours.step(0.1, TRUE)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="p0"):
        build(make_parameters([(2,)], torch.float16), {})
    with pytest.raises(ValueError, match="parameters"):
        build([], {})


# Clipping


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_clipping_is_torch_s_up_to_summation_order(limit: float | None) -> None:
    mine, reference = make_parameters(SHAPES), make_parameters(SHAPES)
    ours = build(mine, {})
    for named in (mine, reference):
        give_gradients(named, 0)
    tensors = [p for _, p in reference]
    expected = torch.nn.utils.clip_grad_norm_(tensors, math.inf if limit is None else limit)
    torch.testing.assert_close(ours.clip(limit), expected, rtol=1e-6, atol=0)
    for (_, p), (_, q) in zip(mine, reference, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=0)


def test_the_norm_of_many_numbers_is_right() -> None:
    values = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    assert float(flat_norm(values)) == pytest.approx(float(values.double().norm()), rel=1e-6)


# Steps with bad numbers

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"states": "bfloat16"},
    "int8": {"states": "int8"},
    "rounded": {"keep_master": False},
    "int8-rounded": {"states": "int8", "keep_master": False},
    "bfloat16-rounded": {"states": "bfloat16", "keep_master": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_numbers_change_nothing(kind: str, dtype: torch.dtype) -> None:
    named = make_parameters([(30, 20), (9,)], dtype)
    ours = build(named, {"weight_decay": 0.1, **KINDS[kind]})
    give_gradients(named, 0)
    ours.step(0.1, TRUE)
    before = {name: t.clone() for name, t in ours.tensors().items() if name != "num_updates"}
    weights = [p.detach().clone() for _, p in named]
    for scale in (math.nan, math.inf):
        ours.zero_grad()
        give_gradients(named, 1, scale=scale)
        norm = ours.clip(1.0)
        assert not norm.isfinite()
        ours.step(0.1, norm.isfinite())
    for name, old in before.items():
        assert torch.equal(ours.tensors()[name], old), name
    for (_, p), old in zip(named, weights, strict=True):
        assert torch.equal(p, old)
    ours.zero_grad()
    give_gradients(named, 1)
    ours.step(0.1, ours.clip(1.0).isfinite())
    for (_, p), old in zip(named, weights, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)  # the next good step is learned from


# Restart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_restoring_goes_on_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    settings = {"weight_decay": 0.1, "seed": 5, **KINDS[kind]}
    whole = make_parameters([(30, 20), (9,), (3, 3)], dtype)
    ours = build(whole, settings)
    saved: dict[str, torch.Tensor] = {}
    weights: list[torch.Tensor] = []
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in ours.tensors().items()}
            weights = [p.detach().clone() for _, p in whole]
        ours.zero_grad()
        give_gradients(whole, step)
        ours.step(0.01, TRUE)
    again = make_parameters([(30, 20), (9,), (3, 3)], dtype)
    second = build(again, settings)
    for (_, p), weight in zip(again, weights, strict=True):
        p.data.copy_(weight)  # as model.adapters.load_weights does
    second.restore(saved)
    for step in range(3, 6):
        second.zero_grad()
        give_gradients(again, step)
        second.step(0.01, TRUE)
    for name, tensor in ours.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name
    for (_, p), (_, q) in zip(whole, again, strict=True):
        assert torch.equal(p, q)


def test_states_of_something_else_are_refused() -> None:
    ours = build(make_parameters([(3, 3)]), {})
    other = build(make_parameters([(3, 3)]), {"states": "int8"})
    with pytest.raises(ValueError, match="scale"):
        ours.restore(other.tensors())


# Master weights


def test_master_weights_collect_micro_batches_in_float32() -> None:
    mine = make_parameters([(40, 30), (17,)], torch.bfloat16)
    reference = [(n, torch.nn.Parameter(p.detach().float().clone())) for n, p in mine]
    ours = build(mine, {"weight_decay": 0.1})
    theirs = torch_adamw(reference, 0.1)
    for step in range(4):
        for micro in range(3):
            give_gradients(mine, 10 * step + micro)
            bf16 = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in mine]
            give_gradients(bf16, 10 * step + micro)
            for (_, p), (_, q) in zip(bf16, reference, strict=True):
                assert p.grad is not None
                q.grad = p.grad.float() if q.grad is None else q.grad + p.grad.float()
        assert all(p.grad is None for _, p in mine)
        step_both(ours, theirs, 1e-2)
    for (name, p), (_, q) in zip(mine, reference, strict=True):
        assert torch.equal(ours.tensors()[f"{name}.master"], q)
        below = _truncate(q.detach().abs()).copysign(q)
        above = (below.view(torch.int32) + 2**16).view(torch.float32)  # the next in bfloat16
        assert bool(((p == below) | (p == above)).all())


@pytest.mark.parametrize(
    ("kind", "dtype", "gradient", "master", "moments"),
    [
        ("float32", torch.float32, 4, 0, 8),
        ("float32", torch.bfloat16, 4, 4, 8),
        ("int8", torch.float32, 4, 0, 2 + 8 / BLOCK),
        ("int8", torch.bfloat16, 4, 4, 2 + 8 / BLOCK),
        ("bfloat16-rounded", torch.bfloat16, 2, 0, 4),
        ("int8-rounded", torch.bfloat16, 2, 0, 2 + 8 / BLOCK),
    ],
)
def test_bytes_of_a_parameter(
    kind: str, dtype: torch.dtype, gradient: float, master: float, moments: float
) -> None:
    settings = KINDS[kind]
    ours = build(make_parameters([(64, 64), (512,)], dtype), settings)
    expected = {"gradient": gradient, "master": master, "states": moments}
    assert ours.state_bytes_per_parameter() == expected


# Stochastic rounding


def test_the_model_sees_updates_of_its_master_that_nearest_would_hide() -> None:
    weight = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    ours = build([("w", weight)], {})
    for _ in range(5):
        ours.zero_grad()
        weight.sum().backward()
        ours.step(1e-4, TRUE)
    master = ours.tensors()["w.master"]
    assert bool((master.to(torch.bfloat16) == 1).all())
    assert float(master.mean()) == pytest.approx(0.9995, abs=1e-6)
    assert float(weight.detach().float().mean()) == pytest.approx(0.9995, abs=1e-4)


def test_stochastic_rounding_takes_a_neighbor_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1.001, -1.001, 3.14159, -2e-20, 1e30, 0.0, math.inf])
    draws = 20_000
    rounded = round_stochastically(values.repeat(draws), generator).view(draws, -1).double()
    below = torch.where(values < 0, -1, 1) * _truncate(values.abs()).double()
    step = _truncate(values.abs()).double() * 2.0**-7  # at most: the gap to the next one
    finite = values.isfinite()
    assert bool((rounded[:, ~finite] == math.inf).all())
    exact = below.float() == values
    assert bool((rounded == below)[:, exact].all())
    assert bool(((rounded - below).abs() <= step)[:, finite].all())
    for column in (~exact & finite).nonzero()[:, 0].tolist():
        seen = rounded[:, column].unique()
        assert len(seen) == 2
        sigma = float(rounded[:, column].std()) / math.sqrt(draws)
        assert abs(float(rounded[:, column].mean()) - float(values[column])) < 4 * sigma


def _truncate(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)


def test_small_updates_are_learned_with_stochastic_rounding_and_lost_without() -> None:
    # Each update is 1e-4 of the weight; a bfloat16 step is 40 times as wide.
    plain = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    rounded = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    theirs = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0, fused=True)
    ours = build([("p", rounded)], {"keep_master": False})
    for _ in range(100):
        plain.grad = torch.ones_like(plain)
        theirs.step()
        ours.zero_grad()
        rounded.sum().backward()
        ours.step(1e-4, TRUE)
    assert bool((plain == 1).all())
    assert float(rounded.detach().float().mean()) == pytest.approx(0.99, abs=5e-4)


# 8-bit states


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_map_is_that_of_the_paper(is_signed: bool) -> None:
    table = dynamic_map(is_signed=is_signed)
    assert table.shape == (256,)
    assert bool((table[1:] > table[:-1]).all())
    assert {0.0, 1.0} <= set(table.tolist())
    assert float(table[0]) == pytest.approx(-0.99297 if is_signed else 0.0, abs=1e-5)
    # The width of a step in the top power of ten: 0.9/64, or 0.9/128 with the sign's bit.
    assert float(table[-2] - table[-3]) == pytest.approx(0.9 / (64 if is_signed else 128), rel=1e-4)
    smallest = float(table[table > 0][0])
    assert smallest == pytest.approx(0.55e-6 if is_signed else 0.325e-6, rel=1e-4)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("size", [256, 1000, 5 * 256])
def test_quantizing_takes_the_nearest_number_of_the_map(is_signed: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) ** 3 * 1e-4
    values = values if is_signed else values.abs()
    numbers, table = dynamic_map(is_signed=is_signed), code_table(is_signed=is_signed)
    codes, scales = quantize(values, table)
    assert codes.dtype == torch.uint8
    assert len(scales) == math.ceil(size / BLOCK)
    back = dequantize(codes, scales, table)
    for start in range(0, size, BLOCK):
        block = values[start : start + BLOCK]
        scale = block.abs().max()
        assert scales[start // BLOCK] == scale
        nearest = (numbers[None] * scale - block[:, None]).abs().amin(1)
        error = (back[start : start + BLOCK] - block).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-3, atol=1e-7 * float(scale))


@pytest.mark.parametrize("is_signed", [True, False])
def test_looking_codes_up_is_bisection(is_signed: bool) -> None:
    numbers = dynamic_map(is_signed=is_signed)
    middles = (numbers[1:] + numbers[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(20_000, generator=generator) * 10 ** -torch.linspace(0, 8, 20_000)
    near = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (-2.0, 2.0)]
    values = torch.cat((numbers, middles, *near, spread, -spread, torch.zeros(1)))
    values = values if is_signed else values[values >= 0]
    expected = torch.bucketize(values, middles).to(torch.uint8)
    assert torch.equal(code_table(is_signed=is_signed).nearest(values), expected)


def test_a_block_of_zeros_stays_zero() -> None:
    table = code_table(is_signed=True)
    codes, scales = quantize(torch.zeros(300), table)
    assert not dequantize(codes, scales, table).any()
    assert not scales.any()


# They learn what AdamW in float32 learns


def fit_quadratic(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of 200 steps on a badly scaled least-squares problem with noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 40, generator=generator) * torch.logspace(-1, 0, 40)
    targets = inputs @ torch.randn(40, 30, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(40, 30, dtype=dtype))
    ours = build([("w", weight)], settings)
    losses: list[float] = []
    for step in range(200):
        rows = torch.randint(0, 256, (32,), generator=generator)
        ours.zero_grad()
        loss = (inputs[rows] @ weight.float() - targets[rows]).square().mean()
        loss.backward()
        ours.step(0.05 * (1 - step / 200), TRUE)
        losses.append(float((inputs @ weight.detach().float() - targets).square().mean()))
    return losses


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_small_states_track_float32_on_a_quadratic(kind: str) -> None:
    dtype = torch.bfloat16 if "rounded" in kind else torch.float32
    expected = fit_quadratic({})
    losses = fit_quadratic(KINDS[kind], dtype)
    first = expected[0]
    assert expected[-1] < 0.02 * first
    for step in (20, 50, 100):
        assert losses[step] == pytest.approx(expected[step], rel=0.1, abs=0.002 * first)
    assert losses[-1] < expected[-1] + 0.002 * first


def test_the_second_moment_in_bfloat16_fades() -> None:
    # Rounded to nearest it would stay at its first value: a step takes 0.1 % off it.
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    ours = build([("w", weight)], {"states": "bfloat16"})
    weight.sum().backward()
    ours.step(0.0, TRUE)
    start = float(ours.tensors()["w.exp_avg_sq"].float().mean())
    for _ in range(100):
        ours.zero_grad()
        ours.step(0.0, TRUE)
    end = float(ours.tensors()["w.exp_avg_sq"].float().mean())
    assert end / start == pytest.approx(0.999**100, rel=2e-3)


def test_parts_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> dict[str, torch.Tensor]:
        named = make_parameters([(40, 30), (900,)])
        ours = build(named, {"states": "int8", "weight_decay": 0.1})
        for step in range(3):
            ours.zero_grad()
            give_gradients(named, step)
            ours.step(0.01, TRUE)
        return {**ours.tensors(), **{name: p.detach() for name, p in named}}

    whole = train()
    monkeypatch.setattr("tunesmith.ops.optim.PART_CPU", 512)
    for name, tensor in train().items():
        assert torch.equal(tensor, whole[name]), name


CONSUMERS: list[Callable[[FlatOptimizer], object]] = [
    lambda optimizer: optimizer.clip(1.0),
    lambda optimizer: optimizer.step(0.1, TRUE),
    lambda optimizer: optimizer.zero_grad(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asks_the_device(kind: str, dtype: torch.dtype) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(  # type: ignore[override]
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            assert "nonzero" not in str(func)
            return func(*args, **(kwargs or {}))

    named = make_parameters([(30, 20), (9,)], dtype)
    ours = build(named, KINDS[kind])
    give_gradients(named, 0)
    with Watch():
        for consume in CONSUMERS:
            consume(ours)
