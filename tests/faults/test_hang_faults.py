"""Runs that hang end themselves; runs that crash are started again as long as that helps."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.runs import KILLED, Child, Place, train_to_the_end
from tunesmith.engine.watchdog import read_heartbeat
from tunesmith.io.manifest import find_damage

pytestmark = pytest.mark.slow

# The first forward of a process takes a second where other tests run beside it.
LIMITS = ("guard.hang_warn_seconds=1.0", "guard.hang_stop_seconds=4.0")

SUPERVISED_SECONDS = 240
"""For several starts in a row, each of which imports torch."""


def hang(place: Place, fault: str, *more: str) -> str:
    """Lets a run hang: it ends with 75 and whole checkpoints only. Returns its stacks."""
    assert place.train(*LIMITS, *more, fault=fault) == 75, place.printed[-3000:]
    assert all(find_damage(path) is None for path in place.checkpoints)
    (stacks,) = place.output.glob("stacks-*.txt")
    warnings = [str(event["message"]) for event in place.events_of("warning")]
    first, last = (text for text in warnings if "the run hangs" in text)
    assert str(stacks) in first
    assert "exit code 75" in last
    text = stacks.read_text()
    assert text.partition(": the run hangs")[0] == first.partition(": the run hangs")[0]
    return text


def goes_on(place: Place, oracle: Place) -> bool:
    """Starts again without a fault; whether that comes to the bits of the uninterrupted run."""
    train_to_the_end(place, *LIMITS)
    return place.final_bytes() == oracle.final_bytes()


def test_row_41_a_step_hangs(place: Place, oracle: Place) -> None:
    """A backward does not return: stacks, then exit 75; the next start goes on to the same bits."""
    text = hang(place, "step.backward:step=7:sleep:90")
    assert text.startswith("phase step, step 7, samples ")
    assert "data.jsonl:" in text.splitlines()[0]
    assert "in _forward_backward" in text
    beat = read_heartbeat(place.output)
    assert beat is not None
    assert (beat.phase, beat.step, bool(beat.places)) == ("step", 7, True)
    assert goes_on(place, oracle)


@pytest.mark.parametrize("background", ["false", pytest.param("true", marks=pytest.mark.whole)])
def test_row_41_a_save_hangs(place: Place, oracle: Place, background: str) -> None:
    """The disk does not answer in a save: no half checkpoint; the one before is used."""
    more = f"checkpoint.background={background}"
    text = hang(place, "save.write:step=6:sleep:90", more)
    assert "engine/checkpoint.py" in text
    assert not checkpoint_of_step(place, 6).exists()
    assert goes_on(place, oracle)


@pytest.mark.whole
def test_row_41_an_evaluation_hangs(place: Place, oracle: Place) -> None:
    """A validation batch does not return: the phase is `evaluation`."""
    text = hang(place, "eval.batch:2:sleep:90")
    assert text.startswith("phase evaluation, step ")
    assert goes_on(place, oracle)


def test_row_42_the_loader_hangs(place: Place, oracle: Place) -> None:
    """The batch of a step does not come: the phase is `data`, and the stack shows the loader."""
    text = hang(place, "data.next:step=5:sleep:90")
    assert text.startswith("phase data, step 5")
    assert "data/loader.py" in text
    assert "engine/prefetch.py" in text
    assert goes_on(place, oracle)


# Crashes


def messages(place: Place) -> list[str]:
    return [line for line in place.printed.splitlines() if line.startswith("tunesmith: ")]


def test_row_31_the_same_crash_twice(place: Place) -> None:
    """One row always crashes: one restart, then an end that names step and samples."""
    fault = "step.micro:samples=17:raise:RuntimeError"
    child = place.start("--auto-restart", "5", fault=fault)
    assert child.wait(SUPERVISED_SECONDS) == 1
    again, end = messages(place)
    assert "failed (exit code 1) in phase step at step " in again
    assert "restart 1 of 5 in 1 s" in again
    assert end.startswith("tunesmith: the same failure twice at step ")
    assert "samples " in end
    assert "data.jsonl:" in end


def test_row_31_crashes_with_progress(place: Place, oracle: Place) -> None:
    """A kill, a hang and an error, each at a later step: three restarts, and the same bits."""
    faults = (
        "step.update:attempt=0&step=4:kill",
        "step.micro:attempt=1&step=9:sleep:90",
        "step.update:attempt=2&step=14:raise:RuntimeError",
    )
    child = place.start("--auto-restart", "3", *LIMITS, fault=",".join(faults))
    assert child.wait(SUPERVISED_SECONDS) == 0, place.printed[-3000:]
    expected = [("killed by SIGKILL", 4), ("hung (exit code 75)", 9), ("failed (exit code 1)", 14)]
    for number, (kind, step) in enumerate(expected, 1):
        line = messages(place)[number - 1]
        assert f"{kind} in phase step at step {step}, samples " in line
        assert f"restart {number} of 3" in line
    assert place.final_bytes() == oracle.final_bytes()


@pytest.mark.whole
def test_row_31_restart_means_the_first_start_alone(place: Place, oracle: Place) -> None:
    """`--restart --auto-restart`: after a crash the new run goes on instead of beginning again."""
    assert place.train(fault="step.update:step=2:kill") == KILLED
    fault = "step.update:attempt=0&step=8:kill"
    child = place.start("--restart", "--auto-restart", "3", fault=fault)
    assert child.wait(SUPERVISED_SECONDS) == 0, place.printed[-3000:]
    assert place.final_bytes() == oracle.final_bytes()
    asides = list(place.output.parent.glob("run.2*"))
    assert len(asides) == 1, "the first run, and not that which crashed"


def supervised_in_step_5(place: Place) -> Child:
    """A supervised run in the middle of a step that takes two seconds."""
    child = place.start("--auto-restart", "3", fault="step.micro:step=5:sleep:2")
    wait_for(lambda: (beat := read_heartbeat(place.output)) is not None and beat.step == 5)
    return child


def wait_for(is_so: Callable[[], Any], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def checkpoint_of_step(place: Place, step: int) -> Path:
    return place.output / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.whole)]
)
def test_row_31_who_asks_a_supervised_run_to_stop_is_heard(place: Place, number: int) -> None:
    """A stop signal to the supervisor: the run saves, ends with 128 + n, and stays ended."""
    child = supervised_in_step_5(place)
    child.send(number)
    assert child.wait() == 128 + number
    assert checkpoint_of_step(place, 5).is_dir()
    assert messages(place) == []


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_row_31_the_supervisor_is_killed(place: Place, oracle: Place) -> None:
    """SIGKILL to the supervisor: the kernel sends the run SIGTERM; it saves and ends."""
    child = supervised_in_step_5(place)
    child.send(signal.SIGKILL)
    assert child.wait() == KILLED
    wait_for(checkpoint_of_step(place, 5).is_dir)
    assert not (place.output / "summary.json").exists()
    wait_for(lambda: "run the same command again" in place.printed)
    assert goes_on(place, oracle)
