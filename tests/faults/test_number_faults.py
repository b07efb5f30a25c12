"""Bad numbers never reach the weights; what made them is named by file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from engine.runs import make_run, train_step
from faults.runs import KILLED, Place
from tunesmith.config.recipe import GuardConfig
from tunesmith.engine.guards import highest_loss, record_loss, record_skip, rolled_back
from tunesmith.engine.state import TrainState

slow = pytest.mark.slow

SAMPLE = 7
"""The row that is made to fail: a training row of the tiny data."""


def all_finite(folder: Path) -> bool:
    import numpy as np

    return all(
        np.isfinite(t).all() for f in folder.glob("*.safetensors") for t in load_file(f).values()
    )


@slow
def test_row_34_one_loss_is_not_a_number(place: Place, oracle: Place) -> None:
    """A NaN loss at one step: no update by it, step and rows are named, the run goes on."""
    assert place.train(fault="step.micro:step=6:nan") == 0, place.printed[-3000:]
    (skip,) = place.events_of("skip")
    assert skip["step"] == 7
    assert "data.jsonl:" in skip["message"]
    assert "not finite" in skip["message"]
    assert all_finite(place.output / "model")
    assert json.loads((place.output / "summary.json").read_text())["skipped_steps"] == 1
    # Up to that step the run is the uninterrupted one, behind it one update is missing.
    before = {step: loss for step, loss in place.losses.items() if step <= 6}
    assert before == {step: oracle.losses[step] for step in before}
    assert place.losses[7] is None  # NaN is no JSON
    assert place.losses[8] != oracle.losses[8]


@slow
def test_row_34_an_infinite_gradient(place: Place) -> None:
    """A loss that is finite and a gradient that is not: no update by it either."""
    assert place.train(fault="step.micro:step=6:scale:1e37") == 0, place.printed[-3000:]
    (skip,) = place.events_of("skip")
    assert skip["step"] == 7
    assert all_finite(place.output / "model")


GUARDED = {"guard": {"window_steps": 8}}


@slow
def test_row_36_one_spike_of_the_loss(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """A loss ten times as high: this step is skipped, the next is not."""
    place = make_place(tmp_path, **GUARDED)
    assert place.train(fault="step.micro:step=12:scale:10") == 0, place.printed[-3000:]
    (skip,) = place.events_of("skip")
    assert skip["step"] == 13
    assert "leaps above" in skip["message"]


@slow
def test_row_12_guards_decide_the_same_after_a_resume(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """A spike before and one after a SIGKILL: the same steps are skipped, the same bits follow."""
    spikes = "step.micro:step=9:scale:10,step.micro:step=15:scale:10"
    whole = make_place(tmp_path / "whole", **GUARDED)
    assert whole.train(fault=spikes) == 0
    assert [event["step"] for event in whole.events_of("skip")] == [10, 16]
    killed = make_place(tmp_path / "killed", **GUARDED)
    assert killed.train(fault=f"{spikes},step.update:step=13:kill") == KILLED
    assert killed.train(fault=spikes) == 0
    assert killed.final_bytes() == whole.final_bytes()


@slow
def test_row_37_several_bad_steps_in_a_row(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """Three skips in a row: back to the last scheduled checkpoint, twice; then exit 4."""
    place = make_place(tmp_path, evaluate={"every": None}, train={"global_batch": 2})
    # From step 7 on all is bad, so two rollbacks do not help.
    assert place.train(fault="step.micro:step>6:nan") == 4, place.printed[-3000:]
    rollbacks = place.events_of("rollback")
    assert [event["to"] for event in rollbacks] == [6, 9]
    assert "data.jsonl:" in rollbacks[0]["message"]
    assert "numbers.bad-steps" in place.printed
    assert "data.jsonl:" in place.printed.split("numbers.bad-steps")[1]


@slow
def test_row_37_most_samples_are_bad(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """The samples to leave out are more than half of all: it stops at once, exit 4."""
    place = make_place(tmp_path, evaluate={"every": None})
    assert place.train(fault="step.micro:step>6:nan") == 4, place.printed[-3000:]
    assert not place.events_of("rollback")
    assert "numbers.bad-steps" in place.printed


@slow
def test_row_37_bad_samples_are_left_out(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """Samples that give NaN in three steps in a row: after one rollback the run finishes, and a
    run that was killed behind the rollback gives the same bits."""
    changes = {"evaluate": {"every": None}, "guard": {"rollback_after": 1}}
    bad = f"step.micro:samples={SAMPLE}:nan"
    whole = make_place(tmp_path / "whole", **changes)
    assert whole.train(fault=bad) == 0, whole.printed[-3000:]
    (rollback,) = whole.events_of("rollback")
    assert f"data.jsonl:{SAMPLE + 1}" in rollback["message"]
    killed = make_place(tmp_path / "killed", **changes)
    step = rollback["step"] + 1
    assert killed.train(fault=f"{bad},step.update:step={step}:kill") == KILLED
    assert killed.train(fault=bad) == 0
    assert killed.final_bytes() == whole.final_bytes()


def test_row_38_a_batch_without_any_label(tiny_recipe: Callable[..., Path]) -> None:
    """A step whose samples carry no supervised token: nothing changes, no NaN, counted."""
    from dataclasses import replace

    import torch

    from tunesmith.engine.loop import fit

    with make_run(tiny_recipe(evaluate={"every": None}), "train.max_steps=3") as run:
        first = run.loader.batch(1)
        empty = replace(run.loader, excluded=frozenset(first.sample_ids))
        assert empty.batch(1).supervised_weight == 0
        before = [parameter.detach().clone() for _, parameter in run.parameters]
        bare = replace(run, loader=replace(empty, excluded=frozenset(run.loader.samples.tolist())))
        loss, norm, _ = train_step(bare, 1)
        assert (loss, norm) == (0.0, 0.0)
        for (_, after), old in zip(run.parameters, before, strict=True):
            assert torch.equal(after, old)
        state = fit(run, TrainState({}, excluded=list(first.sample_ids)))
    assert (state.num_empty, state.num_learned, state.num_skipped) == (1, 2, 0)


def test_row_39_a_token_the_model_does_not_know(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A token id beyond the vocabulary: refused before the model is loaded."""
    import shutil

    from tunesmith import fine_tune, load_recipe
    from tunesmith.errors import ModelError

    recipe = tiny_recipe()
    source = Path(json.loads(recipe.read_text())["model"]["id"])
    small = tmp_path / "small"
    shutil.copytree(source, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    with pytest.raises(ModelError) as caught:
        fine_tune(load_recipe(recipe, [f"model.id={small}", f"output={tmp_path / 'run2'}"]))
    assert caught.value.code == "model.vocabulary"


@slow
def test_row_37_losses_that_stay_high(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """The losses leap and stay (a harder source follows): at last they are learned from again."""
    place = make_place(tmp_path, evaluate={"every": None}, **GUARDED, train={"global_batch": 2})
    assert place.train(fault="step.micro:step>30:scale:10") == 0, place.printed[-3000:]
    assert len(place.events_of("rollback")) == 2
    assert any("learned from again" in e["message"] for e in place.events_of("warning"))
    skipped = {event["step"] for event in place.events_of("skip")}
    assert max(skipped) < 79


@slow
def test_row_12_an_error_in_an_evaluation_moves_no_rollback(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """A step saved by last words counts as scheduled when the plain run saves there, too."""
    changes = {"guard": {"rollback_after": 1}}
    bad = "step.micro:step=8&samples=7:nan,step.micro:step=9&samples=7:nan"
    bad += ",step.micro:step=10&samples=7:nan,step.micro:step=11&samples=7:nan"
    whole = make_place(tmp_path / "whole", **changes)
    assert whole.train(fault=bad) == 0
    for number, signal in enumerate(("raise:KeyError", "term")):
        broken = make_place(tmp_path / str(number), **changes)
        code = broken.train(fault=f"{bad},eval.batch:9:{signal}")
        assert code in (1, 143), broken.printed[-2000:]
        assert broken.train(fault=bad) == 0
        found = [[e["to"] for e in p.events_of("rollback")] for p in (whole, broken)]
        assert found[0] == found[1]
        assert broken.final_bytes() == whole.final_bytes()


# Guards alone


def state_with(losses: list[float], **values: Any) -> TrainState:
    state = TrainState({}, **values)
    for step, loss in enumerate(losses):
        record_loss(state, step, loss, GuardConfig(window_steps=8))
    return state


def test_the_highest_loss_by_hand() -> None:
    """Mean plus six deviations of the window, the step just before left out."""
    guard = GuardConfig(window_steps=4, spike_sigma=6.0)
    state = state_with([1.0, 2.0, 1.0, 2.0, 50.0])
    # Of step 5 the losses of steps 0 to 3 are known: mean 1.5, deviation 0.5.
    assert highest_loss(state, 5, guard) == pytest.approx(1.5 + 6 * 0.5)


def test_few_losses_and_no_sigma_give_no_limit() -> None:
    """Nothing is a spike before a quarter of the window is known, or if it is turned off."""
    assert highest_loss(state_with([1.0]), 2, GuardConfig(window_steps=8)) == math.inf
    steady = state_with([1.0] * 8)
    assert highest_loss(steady, 9, GuardConfig(window_steps=8, spike_sigma=None)) == math.inf
    # Losses that do not vary at all: a twentieth of the mean counts as their deviation.
    assert highest_loss(steady, 9, GuardConfig(window_steps=8, spike_sigma=6.0)) == pytest.approx(
        1.3
    )


def test_a_good_step_ends_a_row_of_bad_ones() -> None:
    """Only steps in a row lead to a rollback."""
    guard = GuardConfig()
    state = state_with([1.0])
    record_skip(state, (1, 2), is_finite=False)
    record_loss(state, 2, 1.0, guard)
    record_skip(state, (3,), is_finite=True)
    assert (state.bad_steps, state.bad_are_finite) == ([(3,)], True)
    assert state.num_skipped == 2


def test_a_rollback_keeps_its_own_counts() -> None:
    """Excluded samples and rollbacks add up, the rest is the checkpoint's."""
    target = TrainState({}, step=6, excluded=[1])
    state = TrainState({}, step=9, excluded=[1], bad_steps=[(5, 3)], num_skipped=1)
    new = rolled_back(state, target)
    assert (new.step, new.excluded, new.num_rollbacks) == (6, [1, 3, 5], 1)
    assert new.bad_steps == [] == target.bad_steps
    assert rolled_back(state, None).step == 9


def test_row_12_guard_state_survives() -> None:
    """What guards decide from is part of the saved state."""
    state = state_with([1.0, 2.0], bad_steps=[(1,)], num_rollbacks=1, excluded=[4])
    again = TrainState.from_json(state.to_json())
    assert again == state
    assert highest_loss(again, 3, GuardConfig()) == highest_loss(state, 3, GuardConfig())
