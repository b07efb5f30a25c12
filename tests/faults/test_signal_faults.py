"""Signals in every phase: the run ends within one unit of work, and nothing is lost."""

from __future__ import annotations

import signal
import time

import pytest

from faults.runs import Place, train_to_the_end

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("step", [4, pytest.param(0, marks=pytest.mark.whole)])
@pytest.mark.parametrize("point", ["step.micro", "step.update"])
def test_row_28_sigterm_in_a_step(place: Place, oracle: Place, step: int, point: str) -> None:
    """SIGTERM at a micro-batch or an update: saved within the step, exit 143, resumed equal."""
    assert place.train(fault=f"{point}:step={step}:term") == 143, place.printed[-3000:]
    assert "run.interrupted" in place.printed
    saved = [int(path.name.removeprefix("step-")) for path in place.checkpoints]
    # In a micro-batch the step is dropped, in the update it is finished.
    assert max(saved, default=0) == step + (point == "step.update")
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()
    assert place.losses == oracle.losses


@pytest.mark.parametrize("name", ["int", pytest.param("term", marks=pytest.mark.whole)])
@pytest.mark.parametrize(
    "fault", ["eval.batch:3", "data.tokenize:1", "model.load:1", "load.read:1"]
)
def test_row_29_signals_in_other_phases(place: Place, oracle: Place, fault: str, name: str) -> None:
    """SIGINT or SIGTERM in evaluation, tokenizing, loading: ends at once; then equal."""
    if fault.startswith("load.read"):
        assert place.train(fault="step.micro:step=5:term") == 143
    started = time.monotonic()
    store = f"TUNESMITH_CACHE={place.output.parent}"  # a cold one, so that there is tokenizing
    environment = dict([store.split("=", 1)]) if "tokenize" in fault else {}
    code = place.train(fault=f"{fault}:{name}", **environment)
    assert code == (143 if name == "term" else 130), place.printed[-3000:]
    assert time.monotonic() - started < 60
    assert "Traceback" not in place.printed
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()


def test_row_29_sighup_of_a_closed_terminal(place: Place, oracle: Place) -> None:
    """The terminal goes away: saved, exit 129."""
    child = place.start(fault="step.micro:step=6:sleep:1")
    child.wait_for('"event": "step", "step": 6,', place.output / "events.jsonl")
    child.send(signal.SIGHUP)
    assert child.wait() == 129
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()


def test_row_30_a_second_signal(place: Place, oracle: Place) -> None:
    """A second SIGINT during the save: immediate exit, no half checkpoint is visible."""
    fault = "step.micro:step=7:int,save.write:step=7:sleep:30"
    child = place.start("checkpoint.background=false", fault=fault)
    child.wait_for('"event": "step", "step": 7,', place.output / "events.jsonl")
    time.sleep(1.0)
    child.send(signal.SIGINT)
    started = time.monotonic()
    assert child.wait() == 130
    assert time.monotonic() - started < 10
    assert all((path / "MANIFEST.json").exists() for path in place.checkpoints)
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()


def test_sigusr1_saves_and_goes_on(place: Place, oracle: Place) -> None:
    """SIGUSR1 asks for a checkpoint at the next step; the run goes on to the same bits."""
    assert place.train(fault="step.micro:step=13:usr1") == 0
    assert 14 in {event["step"] for event in place.events_of("checkpoint")}
    assert place.final_bytes() == oracle.final_bytes()


def test_last_words_of_a_crash(place: Place, oracle: Place) -> None:
    """An error in the middle of a step: the steps before it are saved, exit 1, then equal."""
    assert place.train(fault="step.backward:step=10:raise:KeyError") == 1
    assert place.checkpoints[-1].name == "step-00000010"
    assert any("before the run broke off" in e["message"] for e in place.events_of("warning"))
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()
