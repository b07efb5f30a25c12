"""The rules beside AdamW: papers' equations, the authors' packages, bad steps, restarts, blocks.

optimizers.json holds what galore_torch, apollo_torch and badam make of the same numbers
(tests/parity/golden_optimizers.py).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import _muon

from tunesmith.ops.optim import (
    Assignment,
    FlatOptimizer,
    FlatSettings,
    NewRule,
    Optimizer,
    build_flat,
    is_hidden_matrix,
)
from tunesmith.ops.rules import apollo
from tunesmith.ops.rules.adafactor import AdafactorSettings, NewAdafactor
from tunesmith.ops.rules.adamw import AdamWSettings, build_flat_adamw
from tunesmith.ops.rules.apollo import ApolloSettings, NewApollo
from tunesmith.ops.rules.badam import BadamSettings, BlockAdamW, block_number
from tunesmith.ops.rules.galore import GaloreSettings, NewGalore, main_directions
from tunesmith.ops.rules.lion import LionSettings, NewLion
from tunesmith.ops.rules.muon import COEFFICIENTS, MuonSettings, NewMuon, orthogonalize
from tunesmith.ops.rules.sgd import NewSgd, SgdSettings

GOLDEN = json.loads((Path(__file__).parent / "optimizers.json").read_text(encoding="utf-8"))
TRUE, FALSE = torch.tensor(True), torch.tensor(False)
MATRICES = [(4, 6), (6, 4), (5, 5)]
EVERY, RATE = 3, 0.01
ADAM = AdamWSettings()

RULES: dict[str, NewRule] = {
    "muon": NewMuon(MuonSettings()),
    "muon-int8": NewMuon(MuonSettings(states="int8")),
    "galore": NewGalore(GaloreSettings(ADAM, rank=2, update_every=EVERY, scale=0.25), seed=0),
    "apollo": NewApollo(ApolloSettings(ADAM, rank=2, update_every=EVERY), seed=0),
    "apollo-mini": NewApollo(ApolloSettings(ADAM, 1, EVERY, 128.0, is_by_channel=False), seed=0),
    "adafactor": NewAdafactor(AdafactorSettings()),
    "lion": NewLion(LionSettings()),
    "lion-bfloat16": NewLion(LionSettings(states="bfloat16")),
    "sgd": NewSgd(SgdSettings()),
    "sgd-plain": NewSgd(SgdSettings(momentum=0.0)),
}
ELEMENTWISE = ("adafactor", "lion", "lion-bfloat16", "sgd", "sgd-plain")

Named = list[tuple[str, torch.nn.Parameter]]


def numbers(shape: Sequence[int], phase: float) -> torch.Tensor:
    """As in tests/parity/golden_optimizers.py."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index * index * 0.37 + phase).float().view(*shape)


def fresh(
    shapes: Sequence[tuple[int, ...]] = MATRICES, dtype: torch.dtype = torch.float32
) -> Named:
    tensors = [numbers(shape, -1.0 - index).to(dtype) for index, shape in enumerate(shapes)]
    return [(f"layers.{i}.weight", torch.nn.Parameter(t)) for i, t in enumerate(tensors)]


def give(named: Named, step: int, scale: float = 1.0) -> None:
    for index, (_, parameter) in enumerate(named):
        if parameter.requires_grad:
            wanted = scale * numbers(parameter.shape, 1.7 * step + index) * (1 + step)
            (parameter * wanted.to(parameter.dtype)).sum().backward()


def build(named: Named, rule: NewRule, **settings: Any) -> FlatOptimizer:
    return build_flat([Assignment(named, rule)], FlatSettings(**settings))


def train(named: Named, optimizer: Optimizer, steps: range = range(7), rate: float = RATE) -> None:
    for step in steps:
        optimizer.zero_grad()
        with optimizer.at_step(step):
            give(named, step)
        optimizer.step(rate, TRUE)


def close(named: Named, expected: Sequence[torch.Tensor], atol: float = 2e-6) -> None:
    for (_, parameter), wanted in zip(named, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted.float(), rtol=1e-5, atol=atol)


# The authors' packages


def golden(name: str) -> list[torch.Tensor]:
    return [torch.tensor(weights) for weights in GOLDEN[name]]


def test_galore_is_galore_torch_s() -> None:
    named = fresh()
    train(named, build(named, RULES["galore"]))
    close(named, golden("galore"))


@pytest.mark.parametrize("name", ["apollo", "apollo-mini"])
def test_apollo_is_apollo_torch_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    periods: dict[int, int] = {}

    def given(rank: int, gradient: torch.Tensor, seed: int) -> torch.Tensor:
        return numbers((rank, gradient.shape[0]), 10.0 + periods[seed]) / math.sqrt(rank)

    for period in range(3):
        for index in range(len(MATRICES)):
            seed = apollo.seed_from("projection", 0, f"layers.{index}.weight", period)
            periods[seed] = period
    monkeypatch.setattr(apollo, "projection", given)
    named = fresh()
    train(named, build(named, RULES[name]))
    close(named, golden(name.replace("-", "_")))


def test_badam_is_badam_s() -> None:
    """But for its first block, which the package leaves a step early."""
    named = fresh([(3, 4)] * 3)
    settings = BadamSettings(ADAM, FlatSettings(weight_decay=0.1), EVERY, "ascending")
    optimizer = BlockAdamW([[item] for item in named], [], settings)
    for step in range(7):
        with optimizer.at_step(step + 1):
            optimizer.zero_grad()
            give(named, step)
        optimizer.step(RATE, TRUE)
    close(named, golden("badam"))


# torch's own


def test_sgd_is_torch_s() -> None:
    for name, momentum in (("sgd", 0.9), ("sgd-plain", 0.0)):
        named, reference = fresh([(4, 6), (5,)]), fresh([(4, 6), (5,)])
        train(named, build(named, RULES[name]))
        theirs = torch.optim.SGD([p for _, p in reference], lr=RATE, momentum=momentum)
        follow(reference, theirs)
        close(named, [p.detach() for _, p in reference])


def test_adafactor_is_torch_s() -> None:
    shapes = [(4, 6), (5,), (2, 3, 4)]
    named, reference = fresh(shapes), fresh(shapes)
    train(named, build(named, RULES["adafactor"]), rate=0.5)  # 1/sqrt t counts from step 5 on
    follow(reference, torch.optim.Adafactor([p for _, p in reference], lr=0.5))
    close(named, [p.detach() for _, p in reference])


def test_muon_is_torch_s_but_for_bfloat16_products() -> None:
    named, reference = fresh(), fresh()
    train(named, build(named, RULES["muon"], weight_decay=0.1))
    theirs = torch.optim.Muon(
        [p for _, p in reference], lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    follow(reference, theirs)
    close(named, [p.detach() for _, p in reference], atol=1e-3)  # an update is 5e-3


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (64, 16)])
def test_newton_schulz_in_bfloat16_is_torch_s(shape: tuple[int, int]) -> None:
    matrix = numbers(shape, 0.5)
    theirs = getattr(_muon, "_zeropower_via_newtonschulz")(matrix, COEFFICIENTS, 5, 1e-7)  # noqa: B009 private
    ours = orthogonalize(matrix.to(torch.bfloat16), 5)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def follow(named: Named, optimizer: torch.optim.Optimizer) -> None:
    for step in range(7):
        optimizer.zero_grad()
        give(named, step)
        optimizer.step()


# The papers' equations, written out in float64


def walk(
    rule: Callable[[torch.Tensor, torch.Tensor, dict[str, Any], int], torch.Tensor], decay: float
) -> list[torch.Tensor]:
    """Weights after seven updates by a rule that gives the step at a learning rate of 1."""
    found: list[torch.Tensor] = []
    for index, shape in enumerate(MATRICES):
        weight, state = numbers(shape, -1.0 - index).double(), dict[str, Any]()
        for step in range(7):
            gradient = (numbers(shape, 1.7 * step + index) * (1 + step)).double()
            delta = rule(weight, gradient, state, step + 1)
            weight = weight * (1 - RATE * decay) - RATE * delta
        found.append(weight)
    return found


def moments(low: torch.Tensor, state: dict[str, Any], t: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = 0.9 * state.get("m", 0) + 0.1 * low
    v = 0.999 * state.get("v", 0) + 0.001 * low**2
    state.update(m=m, v=v)
    return m / (1 - 0.9**t), v / (1 - 0.999**t)


def slow_galore(_: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    is_tall = g.shape[0] >= g.shape[1]
    g = g.T if is_tall else g
    if (t - 1) % EVERY == 0:
        u = torch.linalg.svd(g)[0][:, :2]
        state["u"] = u * torch.stack([column[column.abs().argmax()].sign() for column in u.T])
    m, v = moments(state["u"].T @ g, state, t)
    delta = 0.25 * state["u"] @ (m / (v.sqrt() + 1e-8))
    return delta.T if is_tall else delta


def slow_muon(_: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    b = 0.95 * state.get("b", 0) + 0.05 * g
    state["b"] = b
    x = 0.05 * g + 0.95 * b
    u, s, v = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _iteration in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(g.shape)) * u @ torch.diag(s) @ v


def slow_lion(_: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    m = state.get("m", torch.zeros_like(g))
    state["m"] = 0.99 * m + 0.01 * g
    return (0.9 * m + 0.1 * g).sign()


def slow_adafactor(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], t: int) -> torch.Tensor:
    beta = 1 - t**-0.8
    row: torch.Tensor = beta * state.get("r", 0) + (1 - beta) * (g**2).mean(1)
    column: torch.Tensor = beta * state.get("c", 0) + (1 - beta) * (g**2).mean(0)
    state.update(r=row, c=column)
    u = g / (torch.outer(row, column) / row.mean()).sqrt()
    u = u / max(1.0, float((u**2).mean().sqrt()))
    return max(1e-3, float((w**2).mean().sqrt())) * u


SLOW = {
    "galore": slow_galore,
    "muon": slow_muon,
    "lion": slow_lion,
    "adafactor": slow_adafactor,
}


@pytest.mark.parametrize("name", SLOW)
def test_equations(name: str) -> None:
    named = fresh()
    train(named, build(named, RULES[name], weight_decay=0.1))
    close(named, walk(SLOW[name], 0.1), atol=1e-5)


def test_apollo_s_equations() -> None:
    named = fresh([(4, 6)])
    settings = ApolloSettings(ADAM, rank=2, update_every=EVERY, scale=4.0)
    train(named, build(named, NewApollo(settings, seed=3), weight_decay=0.1))
    weight, state, last = numbers((4, 6), -1.0).double(), dict[str, Any](), 0.0
    for step in range(7):
        t, gradient = step + 1, (numbers((4, 6), 1.7 * step) * (1 + step)).double()
        seed = apollo.seed_from("projection", 3, "layers.0.weight", step // EVERY)
        low = apollo.projection(2, gradient.float(), seed).double() @ gradient
        m, v = moments(low, state, t)
        c = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        scaled = gradient * ((m / v.sqrt()).norm(dim=0) / low.norm(dim=0)) / c
        norm = float(scaled.norm())
        allowed = min(norm, 1.01 * last) if last else norm
        last = allowed
        weight = weight * (1 - RATE * 0.1) - RATE * 2.0 * c * scaled * (allowed / norm)
    close(named, [weight], atol=1e-5)


def test_eigenvectors_span_what_singular_vectors_do() -> None:
    gradient = numbers((20, 30), 0.3) * torch.logspace(0, -8, 20)[:, None] * 1e-9
    expected = torch.linalg.svd(gradient.double())[0][:, :4]
    found = main_directions(gradient, 4).double()
    torch.testing.assert_close(
        (found.T @ expected).abs(), torch.eye(4, dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert main_directions(torch.full((3, 4), math.nan), 2).isfinite().all()
    assert main_directions(torch.zeros(3, 4), 2).isfinite().all()


# Bad numbers, restarts


KINDS = [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]


def shapes_for(name: str) -> list[tuple[int, ...]]:
    return [(30, 20), (16, 16), (9,)] if name in ELEMENTWISE else [(30, 20), (16, 16)]


@pytest.mark.parametrize(("dtype", "keep_master"), KINDS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_bad_numbers_change_nothing(name: str, dtype: torch.dtype, keep_master: bool) -> None:
    for first in (0, 1, EVERY):  # the very first update, one in between, one that renews a basis
        named = fresh(shapes_for(name), dtype)
        ours = build(named, RULES[name], weight_decay=0.1, keep_master=keep_master)
        train(named, ours, range(first))
        before = {k: t.clone() for k, t in ours.tensors().items() if k != "num_updates"}
        weights = [p.detach().clone() for _, p in named]
        for scale in (math.nan, math.inf, 1.0):  # the last one a leap of the loss
            ours.zero_grad()
            give(named, first, scale)
            ours.step(RATE, FALSE)
            for key, old in before.items():
                assert torch.equal(ours.tensors()[key], old), key
            for (_, p), old in zip(named, weights, strict=True):
                assert torch.equal(p, old)
        train(named, ours, range(first, first + 1), rate=0.1)
        for (_, p), old in zip(named, weights, strict=True):
            assert p.isfinite().all()
            assert not torch.equal(p, old)  # the next good step is learned from


@pytest.mark.parametrize(("dtype", "keep_master"), KINDS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_restoring_goes_on_with_the_same_bits(
    name: str, dtype: torch.dtype, keep_master: bool
) -> None:
    settings = {"weight_decay": 0.1, "keep_master": keep_master, "seed": 5}
    whole = fresh(shapes_for(name), dtype)
    ours = build(whole, RULES[name], **settings)
    train(whole, ours, range(4))
    saved = {key: tensor.clone() for key, tensor in ours.tensors().items()}
    weights = [p.detach().clone() for _, p in whole]
    train(whole, ours, range(4, 8))
    again = fresh(shapes_for(name), dtype)
    second = build(again, RULES[name], **settings)
    for (_, p), weight in zip(again, weights, strict=True):
        p.data.copy_(weight)
    second.restore(saved)
    train(again, second, range(4, 8))
    for key, tensor in ours.tensors().items():
        assert torch.equal(second.tensors()[key], tensor), key
    for (_, p), (_, q) in zip(whole, again, strict=True):
        assert torch.equal(p, q)


def test_rates_of_their_own_are_those_of_another_optimizer() -> None:
    for rule in RULES.values():
        named, apart = fresh([(6, 4)]), fresh([(6, 4)])
        factors = {"layers.0.weight": 16.0}
        train(named, build_flat([Assignment(named, rule)], FlatSettings(), factors), rate=1e-3)
        train(apart, build(apart, rule), rate=16e-3)
        assert torch.equal(named[0][1], apart[0][1])


def test_a_gradient_of_zero_does_not_stop_apollo() -> None:
    named = fresh([(4, 6)])
    ours = build(named, RULES["apollo"])
    ours.step(RATE, TRUE)
    before = named[0][1].detach().clone()
    train(named, ours, range(1, 3))
    assert float((named[0][1].detach() - before).abs().max()) > RATE / 10


# Blocks


def new_blocks(dtype: torch.dtype, **settings: Any) -> tuple[Named, BlockAdamW]:
    named = fresh([(3, 4), (4,), (3, 4), (4,), (3, 4), (5, 5)], dtype)
    blocks, outside = [named[0:2], named[2:4], named[4:5]], named[5:]
    chosen: dict[str, Any] = {"switch_every": 2, "order": "random", **settings}
    return named, BlockAdamW(blocks, outside, BadamSettings(ADAM, FlatSettings(), **chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_active_block_is_trained(dtype: torch.dtype) -> None:
    named, ours = new_blocks(dtype, order="descending")
    for step, expected in enumerate([{4}, {4}, {2, 3}, {2, 3}, {0, 1}, {0, 1}, {4}]):
        before = [p.detach().clone() for _, p in named]
        with ours.at_step(step):
            ours.zero_grad()
            assert {i for i, (_, p) in enumerate(named) if p.requires_grad} == expected
            give(named, step)
        assert all(p.requires_grad for _, p in named)
        ours.clip(1.0)
        ours.step(0.1, TRUE)
        changed = {i for i, (_, p) in enumerate(named) if not torch.equal(p, before[i])}
        assert changed == expected
        assert {name for name in ours.tensors() if name.endswith(".exp_avg")} == {
            f"layers.{index}.weight.exp_avg" for index in expected
        }
        held = {i for i, (_, p) in enumerate(named) if p.grad is not None}
        assert held == (expected if dtype == torch.float32 else set())


def test_all_weights_require_gradients_again_after_an_error() -> None:
    named, ours = new_blocks(torch.float32)
    with pytest.raises(MemoryError), ours.at_step(0):
        raise MemoryError
    assert all(p.requires_grad for _, p in named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_blocks_go_on_with_the_same_bits(dtype: torch.dtype, cut: int) -> None:
    whole, ours = new_blocks(dtype)
    train(whole, ours, range(cut))
    saved = {key: tensor.clone() for key, tensor in ours.tensors().items()}
    weights = [p.detach().clone() for _, p in whole]
    train(whole, ours, range(cut, 8))
    again, second = new_blocks(dtype)
    for (_, p), weight in zip(again, weights, strict=True):
        p.data.copy_(weight)
    second.restore(saved)
    train(again, second, range(cut, 8))
    for (_, p), (_, q) in zip(whole, again, strict=True):
        assert torch.equal(p, q)
    ours.restore(saved)  # a rollback into another block
    with pytest.raises(ValueError, match="blocks"):
        ours.restore({"num_updates": torch.tensor(1)})


def test_bad_numbers_change_no_block() -> None:
    named, ours = new_blocks(torch.bfloat16)
    before = [p.detach().clone() for _, p in named]
    with ours.at_step(0):
        give(named, 0, math.nan)
    ours.step(0.1, FALSE)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


def test_random_blocks_all_have_their_turn() -> None:
    drawn = [block_number(period, 5, "random", 7) for period in range(50)]
    assert set(Counter(drawn).values()) == {10}
    assert all(len(set(drawn[turn : turn + 5])) == 5 for turn in range(0, 50, 5))
    assert len({tuple(drawn[turn : turn + 5]) for turn in range(0, 50, 5)}) > 1
    assert drawn != [block_number(period, 5, "random", 8) for period in range(50)]


# They learn


@pytest.mark.parametrize(
    ("name", "rate"),
    [("muon", 0.1), ("galore", 1.0), ("apollo", 0.1), ("apollo-mini", 0.02), ("adafactor", 0.3),
     ("lion", 0.02), ("sgd", 0.5), ("sgd-plain", 5.0)],
)  # fmt: skip
def test_a_matrix_is_found(name: str, rate: float) -> None:
    inputs, wanted = numbers((64, 12), 0.2), numbers((12, 8), 0.9)
    weight = torch.nn.Parameter(numbers((12, 8), -1.0))
    ours = build([("layers.0.w", weight)], RULES[name])
    losses: list[float] = []
    for step in range(150):
        ours.zero_grad()
        loss = (inputs @ (weight - wanted)).square().mean()
        loss.backward()
        ours.step(rate * (1 - step / 150), TRUE)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_hidden_matrices_are_told_by_name() -> None:
    inside = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert is_hidden_matrix(inside, (8, 64))
    assert is_hidden_matrix("model.layers.10.mlp.up_proj.weight", (8, 64))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "score.weight"):
        assert not is_hidden_matrix(name, (8, 64))
    assert not is_hidden_matrix("model.layers.10.input_layernorm.weight", (8,))


def test_adamw_is_one_of_them() -> None:
    named = fresh()
    optimizer: Optimizer = build_flat_adamw(named, ADAM, FlatSettings())
    train(named, optimizer)
    optimizer.restore(optimizer.tensors())
