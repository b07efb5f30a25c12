"""The rules beside AdamW in runs: recipes, exact resume, no waiting, planned bytes, blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from engine.test_optimizer import ScalarReads, as_bfloat16, train
from tunesmith import load_recipe
from tunesmith.config.optimizer import SHORT_OPTIMIZERS, ApolloConfig, GaloreConfig
from tunesmith.config.recipe import TrainConfig
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.step import update
from tunesmith.errors import RecipeError
from tunesmith.model.optimizer_bytes import optimizer_bytes, trained_of
from tunesmith.ops.optim import FlatOptimizer
from tunesmith.ops.rules.badam import BlockAdamW

RULES: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon"},
    "muon-int8": {"name": "muon", "states": "int8"},
    "galore": {"name": "galore", "rank": 4, "update_every": 3},
    "apollo": {"name": "apollo", "rank": 4, "update_every": 3},
    "apollo_mini": {"name": "apollo_mini", "update_every": 3},
    "badam": {"name": "badam", "switch_every": 3, "outside": True},
    "badam-int8": {"name": "badam", "switch_every": 2, "order": "descending", "states": "int8"},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd"},
    "sgd-plain": {"name": "sgd", "momentum": 0.0},
}
FULL = "method={name: full}"


def fast(*names: str) -> list[Any]:
    """All rules; those not named here are slow: they go the same ways."""
    marks = {name: [] if name in names else [pytest.mark.slow] for name in RULES}
    return [pytest.param(name, marks=marks[name]) for name in RULES]


def settings(name: str) -> str:
    return f"train.optimizer={RULES[name]}".replace("'", "")


# Recipes


def test_every_rule_has_a_short_form() -> None:
    def read(value: object) -> Any:
        return TrainConfig.model_validate({"optimizer": value}).optimizer

    for short, long in SHORT_OPTIMIZERS.items():
        assert read(short) == read(long)
        assert read(read(short).model_dump(mode="json")) == read(short)
    mini = read({"name": "apollo_mini", "update_every": 50})
    assert mini == ApolloConfig(
        name="apollo", rank=1, scale=128.0, factors="matrix", update_every=50
    )
    assert read({"name": "galore", "rank": 128, "update_every": 200, "scale": 2.0}) == read(
        GaloreConfig(name="galore")
    )


@pytest.mark.parametrize(
    ("optimizer", "problem"),
    [
        ("{name: lion, rank: 8}", "rank"),
        ("{name: galore, states: int8}", "states"),
        ("{name: adamw, momentum: 0.9}", "momentum"),
        ("{name: sgd, momentum: 0, states: int8}", "momentum"),
        ("adam", "adamw"),
        ("{name: adam}", "adamw"),
    ],
)
def test_settings_of_another_rule_are_refused(
    tiny_recipe: Callable[..., Path], optimizer: str, problem: str
) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(tiny_recipe(), [f"train.optimizer={optimizer}"])


@pytest.mark.parametrize("optimizer", ["galore", "apollo", "apollo_mini", "badam"])
def test_rules_for_whole_weights_want_them(
    tiny_recipe: Callable[..., Path], optimizer: str
) -> None:
    recipe = tiny_recipe(method={"name": "lora"})
    with pytest.raises(RecipeError, match="method: full"):
        load_recipe(recipe, [f"train.optimizer={optimizer}"])
    load_recipe(recipe, [f"train.optimizer={optimizer}", "method=full"])


def test_a_rule_without_matrices_is_refused() -> None:
    named = [("model.norm.weight", torch.nn.Parameter(torch.ones(4)))]
    config = TrainConfig.model_validate({"optimizer": "muon"})
    with pytest.raises(RecipeError) as caught:
        build_optimizer(named, config)
    assert caught.value.code == "recipe.optimizer"


def test_a_new_head_is_not_left_out() -> None:
    named = [*whole_model(torch.float32), ("score.weight", torch.nn.Parameter(torch.ones(1, 64)))]
    with pytest.raises(RecipeError, match="score") as caught:
        build_optimizer(named, TrainConfig.model_validate({"optimizer": "badam"}))
    assert caught.value.code == "recipe.optimizer"
    config = TrainConfig.model_validate({"optimizer": {"name": "badam", "outside": True}})
    optimizer = build_optimizer(named, config)
    assert isinstance(optimizer, BlockAdamW)
    assert not optimizer.outside


# Steps


@pytest.mark.parametrize("name", fast("galore"))
def test_a_step_does_not_wait_for_the_device(tiny_recipe: Callable[..., Path], name: str) -> None:
    with make_run(tiny_recipe(), FULL, settings(name)) as run:
        batches = [run.loader.batch(step) for step in range(2)]
        update(run, batches[0], 0)
        with ScalarReads() as reads:
            update(run, batches[1], 1)
        assert reads.places == []


def whole_model(dtype: torch.dtype) -> list[tuple[str, torch.nn.Parameter]]:
    shapes = {
        "model.embed_tokens.weight": (300, 64),
        **{f"model.layers.{n}.mlp.weight": (64, 256) for n in range(3)},
        **{f"model.layers.{n}.attention.weight": (64, 64) for n in range(3)},
        **{f"model.layers.{n}.norm.weight": (64,) for n in range(3)},
        "model.norm.weight": (64,),
    }
    return [(name, torch.nn.Parameter(torch.ones(s, dtype=dtype))) for name, s in shapes.items()]


@pytest.mark.parametrize("keep_master", [True, False])
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("name", [*RULES, "adamw"])
def test_planned_bytes_are_those_kept(name: str, is_bf16: bool, keep_master: bool) -> None:
    optimizer = {**RULES.get(name, {}), "keep_master": keep_master}
    train_config = TrainConfig.model_validate({"optimizer": optimizer})
    parameters = whole_model(torch.bfloat16 if is_bf16 else torch.float32)
    built = build_optimizer(parameters, train_config)
    if isinstance(built, BlockAdamW):
        kept = max(bytes_of(built, period) for period in range(len(built.blocks)))
    else:
        assert isinstance(built, FlatOptimizer)
        kept = all_bytes(built)
    planned = optimizer_bytes(trained_of(parameters), train_config.optimizer, is_bf16=is_bf16)
    assert planned == pytest.approx(kept, rel=2e-3)


def all_bytes(optimizer: FlatOptimizer) -> float:
    count = sum(p.numel() for group in optimizer.groups for p in group.layout.parameters)
    return count * sum(optimizer.state_bytes_per_parameter().values())


def bytes_of(optimizer: BlockAdamW, period: int) -> float:
    with optimizer.at_step(period * optimizer.settings.switch_every):
        return all_bytes(optimizer.active)


def test_weights_outside_the_block_get_no_gradient(tiny_recipe: Callable[..., Path]) -> None:
    with make_run(tiny_recipe(), FULL, "train.optimizer={name: badam, order: ascending}") as run:
        before = {name: p.detach().clone() for name, p in run.parameters}
        update(run, run.loader.batch(0), 0)
        changed = {name for name, p in run.parameters if not torch.equal(p, before[name])}
        assert changed == {name for name in before if ".layers.0." in name}
        assert {name for name, p in run.parameters if p.grad is not None} == changed
        assert all(p.requires_grad for _, p in run.parameters)


# Restarts


@pytest.mark.parametrize("keep_master", [True, False])
@pytest.mark.parametrize("name", fast("badam"))
def test_bfloat16_weights_go_on_exactly(
    tiny_recipe: Callable[..., Path], name: str, keep_master: bool
) -> None:
    optimizer = {**RULES[name], "keep_master": keep_master}
    with make_run(tiny_recipe(method={"name": "lora"}), FULL) as run:
        whole = as_bfloat16(run, **optimizer)
        train(whole, range(4))
        weights = {name: p.detach().clone() for name, p in whole.parameters}
        states = {name: tensor.clone() for name, tensor in whole.optimizer.tensors().items()}
        train(whole, range(4, 8))
        expected = {name: p.detach().clone() for name, p in whole.parameters}
    with make_run(tiny_recipe(method={"name": "lora"}), FULL) as run:
        again = as_bfloat16(run, **optimizer)
        for key, parameter in again.parameters:
            parameter.data.copy_(weights[key])
        again.optimizer.restore(states)
        train(again, range(4, 8))
    for key, parameter in again.parameters:
        assert torch.equal(parameter, expected[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "full") for name in RULES), ("muon", "lora"), ("lion", "lora"), ("galore", "freeze")],
)
def test_a_stopped_run_goes_on_exactly(
    tiny_recipe: Callable[..., Path], tmp_path: Path, name: str, method: str
) -> None:
    recipe = tiny_recipe(
        method={"name": "lora"}, train={"learning_rate": 0.001, "optimizer": RULES[name]}
    )
    text = recipe.read_text().replace(
        '"name": "lora", "rank": 4, "dropout": 0.1', f'"name": "{method}"'
    )
    recipe.write_text(text)
    whole = run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "stopped", 7)
    run_to_end(recipe, tmp_path / "stopped")
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "whole")
    assert whole["steps"] == 20
