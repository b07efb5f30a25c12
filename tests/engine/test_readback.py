"""Numbers read one step late: from a device that is played by a queue, and by CUDA if it is there.

The loop gives the same run with and without the lag, and bad numbers stop it all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith.engine.loop as loop
from engine.runs import make_run
from tunesmith import fine_tune, load_recipe
from tunesmith.engine.events import read_events
from tunesmith.engine.readback import Read, Readback, open_readback
from tunesmith.engine.state import TrainState
from tunesmith.types import Event


class FakeDevice:
    """Copies are finished only when somebody waits for them, in the order they were begun."""

    def __init__(self) -> None:
        self.begun: list[torch.Tensor] = []
        self.num_waited = 0

    def start(self, numbers: torch.Tensor) -> Read:
        index = len(self.begun)
        self.begun.append(numbers.clone())

        def read() -> list[float]:
            assert index == self.num_waited, "read out of order"
            self.num_waited += 1
            return self.begun[index].tolist()

        return read


def test_one_step_late_and_all_in_the_end() -> None:
    device = FakeDevice()
    numbers: Readback[str] = Readback(device.start, lag=1)
    numbers.put("a", torch.tensor([1.0, 2.0]), 0.0)
    assert list(numbers.ready()) == []
    assert device.num_waited == 0
    numbers.put("b", torch.tensor([3.0, 4.0]), 0.0)
    assert [(a.about, a.numbers) for a in numbers.ready()] == [("a", [1.0, 2.0])]
    assert device.num_waited == 1
    numbers.put("c", torch.tensor([5.0, 6.0]), 0.0)
    assert [a.about for a in numbers.drain()] == ["b", "c"]
    assert list(numbers.drain()) == []


def test_times_of_overlapping_steps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr("tunesmith.engine.readback.time.perf_counter", lambda: next(clock))
    numbers: Readback[int] = Readback(FakeDevice().start, lag=1)
    numbers.put(0, torch.zeros(1), started=4.0)
    numbers.put(1, torch.zeros(1), started=5.0)
    assert [a.seconds for a in numbers.drain()] == [6.0, 2.0]
    numbers.put(2, torch.zeros(1), started=17.0)
    assert [a.seconds for a in numbers.drain()] == [3.0]


def test_a_cpu_is_read_at_once() -> None:
    numbers = open_readback(torch.device("cpu"), str)
    numbers.put("a", torch.tensor([1.5]), 0.0)
    assert [a.numbers for a in numbers.ready()] == [[1.5]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_read_a_step_late_without_a_sync() -> None:
    numbers = open_readback(torch.device("cuda"), int)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            numbers.put(step, torch.full((2,), float(step), device="cuda"), 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [a.about for a in numbers.ready()] == [0, 1]
    assert [a.numbers for a in numbers.drain()] == [[2.0, 2.0]]


def play_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()

    def open_late(_: torch.device, kind: type[Any]) -> Readback[Any]:
        # Validation has a queue of its own; only the steps are delayed here.
        if kind is loop.StepNote:
            return Readback(device.start, lag=1)
        return open_readback(torch.device("cpu"), kind)

    monkeypatch.setattr("tunesmith.engine.loop.open_readback", open_late)
    return device


def losses_and_state(recipe: Path, output: Path) -> tuple[dict[int, tuple[str, ...]], Any]:
    events: list[Event] = []
    run, _ = fine_tune(load_recipe(recipe, [f"output={output}"]), listeners=[events.append])
    steps = {
        e.step: tuple(str(e.data[k]) for k in ("loss", "grad_norm", "epoch"))
        for e in events
        if e.kind == "step"
    }
    states = [
        json.loads((path / "state.json").read_text())
        for path in sorted((run.path / "checkpoints").iterdir())
    ]
    for state in states:
        state.pop("train_seconds")
    # Whatever is told of a later step is told after it, but for checkpoints in the background.
    order = [e.step for e in events if e.kind in ("step", "evaluation")]
    assert order == sorted(order)
    return steps, states


def test_a_run_read_late_is_the_same_run(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train={"max_steps": 7})
    at_once = losses_and_state(recipe, tmp_path / "at-once")
    device = play_device(monkeypatch)
    late = losses_and_state(recipe, tmp_path / "late")
    assert len(device.begun) == device.num_waited == 7
    assert late == at_once


def test_bad_numbers_read_late_name_their_step_and_change_nothing(
    tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    play_device(monkeypatch)
    changes = {"evaluate": {"every": None}, "checkpoint": {"every_steps": 100}}
    with make_run(tiny_recipe(**changes), "train.max_steps=6") as run:
        real, weights = run.objective, {}

        class Poison:
            calls = 0
            metric_names = ()

            def step(self, model: Any, batch: Any) -> Any:
                result = real.step(model, batch)
                if model.training:
                    Poison.calls += 1
                if Poison.calls == 4:
                    weights.update({n: p.detach().clone() for n, p in run.parameters})
                    return type(result)(result.loss_sum * float("nan"))
                if Poison.calls == 5 and model.training:
                    assert all(torch.equal(p, weights[n]) for n, p in run.parameters)
                if Poison.calls == 6 and model.training:
                    assert not any(torch.equal(p, weights[n]) for n, p in run.parameters)
                return result

        poisoned = replace(
            run, objective=Poison(), loader=replace(run.loader, micro_batch_tokens=100_000)
        )
        state = loop.fit(poisoned, TrainState({}))
        assert (state.step, state.num_skipped, state.num_learned) == (6, 1, 5)
    (skip,) = [
        e for e in read_events(Path(run.recipe.output) / "events.jsonl") if e["event"] == "skip"
    ]
    assert skip["step"] == 4
    assert "data.jsonl:" in skip["message"]
