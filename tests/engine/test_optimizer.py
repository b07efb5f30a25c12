"""The optimizer in a run: recipe forms, no waiting in a step, every kind learns and resumes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from tunesmith.config.optimizer import AdamWConfig
from tunesmith.config.recipe import TrainConfig
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.step import Run, evaluate_loss, update
from tunesmith.model.adapters import load_weights, save_weights, trainable_parameters
from tunesmith.ops.optim import FlatOptimizer


def test_short_forms() -> None:
    def read(value: object) -> tuple[str, bool]:
        optimizer = TrainConfig.model_validate({"optimizer": value}).optimizer
        assert isinstance(optimizer, AdamWConfig)
        return optimizer.states, optimizer.keep_master

    assert TrainConfig().optimizer == AdamWConfig()
    assert read("adamw") == ("float32", True)
    assert read("adamw_bf16") == ("bfloat16", True)
    assert read("adamw_8bit") == ("int8", True)
    assert read("adamw_8bit_sr") == ("int8", False)
    assert read({"states": "int8", "keep_master": False}) == ("int8", False)
    with pytest.raises(ValueError, match="adamw"):
        read("adam")


class ScalarReads(TorchDispatchMode):
    """Counts what would wait for a device: reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            stack = traceback.extract_stack()
            ours = [frame for frame in stack if "site-packages" not in frame.filename][-2]
            self.places.append(f"{ours.filename}:{ours.lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_does_not_wait_for_the_device(tiny_recipe: Callable[..., Path], method: str) -> None:
    with make_run(tiny_recipe(method={"name": "lora"}), f"method={method}") as run:
        batch = run.loader.batch(0)
        with ScalarReads() as reads:
            numbers = update(run, batch, 0)
        assert reads.places == []
        assert numbers is not None
        with ScalarReads() as reads:
            float(numbers[0])
        assert len(reads.places) == 1  # it does count


def as_bfloat16(run: Run, **optimizer: Any) -> Run:
    """A run whose model is in bfloat16, with an optimizer for it."""
    for _, parameter in run.parameters:
        parameter.grad = None
    run.model.to(torch.bfloat16)
    changed = {"optimizer": TrainConfig.model_validate({"optimizer": optimizer}).optimizer}
    train = run.recipe.train.model_copy(update=changed)
    parameters = trainable_parameters(run.model)
    return replace(
        run,
        recipe=run.recipe.model_copy(update={"train": train}),
        parameters=parameters,
        optimizer=build_optimizer(parameters, train),
        autocast_dtype=torch.bfloat16,
    )


def validation_loss(run: Run) -> float:
    assert run.validation is not None
    loss = evaluate_loss(run, replace(run.validation, micro_batch_tokens=100_000).all_batches())
    assert loss is not None
    return loss[0]


def train(run: Run, steps: range) -> float:
    for step in steps:
        update(run, run.loader.batch(step), step)
    return validation_loss(run)


FULL = {"train.learning_rate": 0.003, "train.weight_decay": 0.01}
SMALL: list[dict[str, Any]] = [
    {"states": "float32"},
    {"states": "bfloat16"},
    {"states": "int8"},
    {"states": "float32", "keep_master": False},
    {"states": "int8", "keep_master": False},
]


# The others take the same code by other ways: their updates are tested one by one in tests/ops.
FAST_AND_SLOW = [
    pytest.param(optimizer, marks=[] if optimizer["states"] == "int8" else pytest.mark.slow)
    for optimizer in SMALL
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", FAST_AND_SLOW, ids=str)
def test_every_kind_learns_as_float32_does(
    tiny_recipe: Callable[..., Path], optimizer: dict[str, Any]
) -> None:
    recipe = tiny_recipe(method={"name": "lora"})
    overrides = ["method=full", *(f"{key}={value}" for key, value in FULL.items())]
    with make_run(recipe, *overrides) as run:
        before = validation_loss(run)
        expected = train(run, range(20))
    with make_run(recipe, *overrides) as run:
        loss = train(as_bfloat16(run, **optimizer), range(20))
    assert expected < 0.8 * before
    assert loss == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("optimizer", FAST_AND_SLOW, ids=str)
def test_every_kind_goes_on_exactly_from_files(
    tiny_recipe: Callable[..., Path], tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    recipe = tiny_recipe(method={"name": "lora"})
    folder = tmp_path / "weights"
    with make_run(recipe, "method=full") as run:
        whole = as_bfloat16(run, **optimizer)
        train(whole, range(4))
        save_weights(whole.model, folder)
        states = {name: tensor.clone() for name, tensor in whole.optimizer.tensors().items()}
        train(whole, range(4, 8))
        expected = {name: p.detach().clone() for name, p in whole.parameters}
    with make_run(recipe, "method=full") as run:
        again = as_bfloat16(run, **optimizer)
        load_weights(again.model, folder)
        again.optimizer.restore(states)
        train(again, range(4, 8))
    assert set(again.optimizer.tensors()) == set(states)
    for name, parameter in again.parameters:
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bf16"])
def test_a_stopped_run_with_small_states_goes_on_exactly(
    tiny_recipe: Callable[..., Path], tmp_path: Path, optimizer: str
) -> None:
    recipe = tiny_recipe(train={"optimizer": optimizer})
    run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "stopped", 7)
    run_to_end(recipe, tmp_path / "stopped")
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_saving_and_loading_weights_in_flat_buffers(
    tiny_recipe: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    from safetensors.torch import load_file

    with make_run(tiny_recipe(method={"name": "lora"}), f"method={method}") as run:
        update(run, run.loader.batch(0), 0)
        saved = {name: p.detach().clone() for name, p in run.parameters}
        save_weights(run.model, tmp_path / "saved")
        stored = load_file(next((tmp_path / "saved").glob("*.safetensors")))
        assert len(stored) == len(saved)  # a tied head is not there twice
        update(run, run.loader.batch(1), 1)
        load_weights(run.model, tmp_path / "saved")
        for name, parameter in run.parameters:
            assert torch.equal(parameter, saved[name]), name
        # The loaded numbers are those the next update starts from: they are still in the buffer.
        assert isinstance(run.optimizer, FlatOptimizer)
        for group in run.optimizer.groups:
            for parameter, view in zip(
                group.layout.parameters, group.layout.views(group.weights_F), strict=True
            ):
                assert parameter.data_ptr() == view.data_ptr()
        if method == "full":
            head = run.model.get_output_embeddings().weight
            assert head is run.model.get_input_embeddings().weight


def test_tied_weights_are_updated_once(tiny_recipe: Callable[..., Path]) -> None:
    with make_run(tiny_recipe(method={"name": "lora"}), "method=full") as run:
        names = [name for name, _ in run.parameters]
        assert "lm_head.weight" not in names
        assert isinstance(run.optimizer, FlatOptimizer)
        counted = sum(p.numel() for group in run.optimizer.groups for p in group.layout.parameters)
        assert counted == sum(p.numel() for p in run.model.parameters())
