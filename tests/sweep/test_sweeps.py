"""Sweeps of the tiny model: trials in turns around one base equal separate runs, bit for bit."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.load import load_recipe, recipe_from
from tunesmith.errors import Interrupted, RecipeError, RunError
from tunesmith.sweep.run import search
from tunesmith.sweep.shared import leaves_base_alone, with_shared_weights
from tunesmith.sweep.together import Turns
from tunesmith.types import Event

pytest.importorskip("optuna")

SPACE = {"train.learning_rate": [0.003, 0.03], "method.rank": [2, 4]}
QUICK: dict[str, Any] = {"rows": 25, "evaluate": {"general": None, "samples": 0}}
GRID = {"space": SPACE, "sampler": "grid", "pruner": "none"}


class Notes:
    """A watcher that writes down what it is told, and can stop the sweep."""

    def __init__(self, stop: Callable[[int, Event], bool] = lambda *_: False) -> None:
        self.lines: list[str] = []
        self.order: list[int] = []
        self._stop = stop

    def begun(self, number: int, values: dict[str, Any]) -> None:
        self.lines.append(f"{number} begun")

    def told(self, number: int, event: Event) -> None:
        if event.kind == "step":
            self.order.append(number)
        if self._stop(number, event):
            signal_main_thread()

    def ended(self, number: int, state: str, value: float | None, why: str) -> None:
        self.lines.append(f"{number} {state}")


def signal_main_thread() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def adapters(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.glob("trial-*/model/adapter_model.safetensors"))
    return {file.parts[-3]: file.read_bytes() for file in found}


def sweep_of(recipe: Path, output: Path, notes: Notes, *overrides: str, **how: Any) -> Any:
    loaded = load_recipe(recipe, [f"output={output}", *overrides])
    return search(loaded, recipe, notes, restart=how.get("restart", False))


# Parts


def test_models_share_weights_and_nothing_else() -> None:
    from transformers import LlamaForCausalLM

    from conftest import make_tiny_config

    base = LlamaForCausalLM(make_tiny_config())
    first, second = with_shared_weights(base), with_shared_weights(base)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr()
    assert first.lm_head.weight is first.model.embed_tokens.weight
    next(first.parameters()).requires_grad_(False)
    assert next(second.parameters()).requires_grad
    first.model.layers[0].forward = None
    ids = torch.arange(8)[None]
    assert torch.equal(second(ids).logits, base(ids).logits)


@pytest.mark.parametrize(
    ("changes", "is_shared"),
    [
        ({}, True),
        ({"method": "full"}, False),
        ({"method": "dora"}, True),
        ({"method": "pissa"}, False),
        ({"method": {"name": "lora", "bias": "all"}}, False),
        ({"model": {"id": "m", "quantize": "nf4"}}, False),
        ({"model": {"id": "m", "new_tokens": ["<x>"]}}, False),
        ({"objective": "reward"}, False),
        ({"objective": "dpo"}, True),
    ],
)
def test_who_leaves_the_base_alone(changes: dict[str, Any], is_shared: bool) -> None:
    assert leaves_base_alone(recipe_from({"model": "m", "data": "d", **changes})) is is_shared


def test_turns_go_round_and_pass_over_those_that_left() -> None:
    turns, order = Turns([1, 2, 3]), list[int]()

    def work(name: int, rounds: int) -> None:
        turns.wait(name)
        for _ in range(rounds):
            order.append(name)
            turns.pass_on(name)
        turns.leave(name)

    threads = [threading.Thread(target=work, args=(name, name)) for name in (3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == [1, 2, 3, 2, 3, 3]


# Whole sweeps


@pytest.mark.slow
def test_trials_in_turns_equal_separate_runs_bit_for_bit(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(sweep=GRID, train={"epochs": 2, "learning_rate": 0.01}, **QUICK)
    together, alone = Notes(), Notes()
    outcome = sweep_of(recipe, tmp_path / "together", together)
    sweep_of(recipe, tmp_path / "alone", alone, "sweep.together=1")
    assert len(set(together.order[:4])) == 4  # a step each
    assert alone.order == sorted(alone.order)
    assert adapters(tmp_path / "together") == adapters(tmp_path / "alone")
    assert len(adapters(tmp_path / "together")) == 4
    separate = tmp_path / "together" / "trial-003" / "recipe.yaml"
    from tunesmith import fine_tune

    fine_tune(load_recipe(separate, [f"output={tmp_path / 'separate'}"]))
    single = (tmp_path / "separate" / "model" / "adapter_model.safetensors").read_bytes()
    assert single == adapters(tmp_path / "together")["trial-003"]
    best = load_recipe(tmp_path / "together" / "best.yaml").recipe
    winner = next(row for row in outcome.rows if row.number == outcome.best)
    assert best.train.learning_rate == winner.values["train.learning_rate"]
    assert best.sweep is None


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_to_the_same_end(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(sweep={**GRID, "together": 3}, train={"epochs": 2}, **QUICK)
    sweep_of(recipe, tmp_path / "whole", Notes())
    stopped = Notes(lambda number, event: number == 1 and event.step == 4)
    with pytest.raises(Interrupted):
        sweep_of(recipe, tmp_path / "stopped", stopped)
    assert "1 stopped" in stopped.lines
    after = Notes()
    sweep_of(recipe, tmp_path / "stopped", after)
    assert adapters(tmp_path / "stopped") == adapters(tmp_path / "whole")
    assert after.lines[:3] == ["0 begun", "1 begun", "2 begun"]
    again = Notes()
    sweep_of(recipe, tmp_path / "stopped", again)
    assert again.lines == []


@pytest.mark.slow
def test_pruned_trials_keep_their_events_and_a_failed_one_is_passed_over(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    space = {"train.learning_rate": [0.03, 1e-6, 2e-6], "method.target": ["all-linear", "nothing"]}
    recipe = tiny_recipe(
        sweep={"space": space, "sampler": "grid"}, train={"epochs": 3}, evaluate={"every": 4}
    )
    notes = Notes()
    outcome = sweep_of(recipe, tmp_path / "sweep", notes)
    states = {row.number: row.state for row in outcome.rows}
    assert states == {0: "complete", 1: "fail", 2: "pruned", 3: "fail", 4: "pruned", 5: "fail"}
    assert "recipe.target" in next(row.why for row in outcome.rows if row.number == 1)
    events = (tmp_path / "sweep" / "trial-002" / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in events]
    assert kinds.count("evaluation") == 2
    assert kinds[-1] == "checkpoint"
    assert outcome.best == 0


@pytest.mark.slow
def test_wrong_metric_time_limit_and_foreign_folders(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(sweep={**GRID, "metric": "los"}, train={"epochs": 2}, **QUICK)
    with pytest.raises(RecipeError, match="did you mean loss"):
        sweep_of(recipe, tmp_path / "metric", Notes())
    with pytest.raises(RunError, match=r"run\.recipe-changed"):
        sweep_of(recipe, tmp_path / "metric", Notes(), "sweep.metric=loss")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(RunError, match=r"run\.foreign"):
        sweep_of(recipe, tmp_path / "other", Notes())
    right = ("sweep.metric=loss", "sweep.minutes=0.0001")
    outcome = sweep_of(recipe, tmp_path / "short", Notes(), *right)
    assert outcome.best is None
    done = sweep_of(recipe, tmp_path / "short", Notes(), "sweep.metric=loss", "sweep.minutes=9")
    assert done.best is not None


@pytest.mark.slow
def test_two_processes_share_the_trials(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(sweep={**GRID, "parallel": 2, "together": 1}, train={"epochs": 1})
    notes = Notes()
    outcome = sweep_of(recipe, tmp_path / "sweep", notes)
    assert [row.state for row in outcome.rows] == ["complete"] * 4
    assert sorted(line for line in notes.lines if "complete" in line) == [
        f"{number} complete" for number in range(4)
    ]
    assert (tmp_path / "sweep" / "worker-1.log").exists()
