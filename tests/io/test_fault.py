"""Faults on purpose: what is planted happens there and nowhere else."""

from __future__ import annotations

import errno
import math
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tunesmith.io.fault import ACTIONS, POINTS, arm, fault, parse_faults


@pytest.fixture(autouse=True)
def _disarm() -> Generator[None]:
    yield
    arm({})


def plant(text: str, **more: str) -> None:
    arm({"TUNESMITH_FAULT": text, **more})


def test_nothing_is_planted() -> None:
    arm({})
    assert fault("step.micro", step=3) == 1.0
    assert fault("no such point") == 1.0  # not looked at: it costs one comparison


def test_an_unknown_point_is_our_mistake() -> None:
    plant("step.micro:1:nan")
    with pytest.raises(ValueError, match="not in POINTS"):
        fault("no such point")


def test_the_nth_passing() -> None:
    plant("step.micro:3:raise:KeyError")
    fault("step.micro")
    fault("step.backward")
    fault("step.micro")
    with pytest.raises(KeyError, match=r"planted at step\.micro"):
        fault("step.micro")
    fault("step.micro")


def test_conditions() -> None:
    plant("step.micro:step=7&tokens>300:nan")
    assert fault("step.micro", step=7, tokens=300) == 1.0
    assert fault("step.micro", step=6, tokens=301) == 1.0
    assert math.isnan(fault("step.micro", step=7, tokens=301))
    assert fault("step.micro") == 1.0  # nothing is known
    plant("step.micro:samples=5:scale:10")
    assert fault("step.micro", samples=lambda: [1, 5]) == 10.0
    assert fault("step.micro", samples=lambda: [1, 4]) == 1.0


def test_attempts_of_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    plant("step.micro:attempt=1:nan")
    assert fault("step.micro") == 1.0
    monkeypatch.setenv("TUNESMITH_ATTEMPT", "1")
    assert math.isnan(fault("step.micro"))


def test_all_that_are_due_happen() -> None:
    plant("*:*:scale:2,step.micro:1:scale:3")
    assert fault("step.micro") == 6.0
    assert fault("step.update") == 2.0


def test_files_are_spoiled(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abcdef")
    plant("save.fsync:1:flip:2,save.fsync:2:truncate:3")
    fault("save.fsync", file)
    assert file.read_bytes() == b"abbdef"
    fault("save.fsync", file)
    assert file.read_bytes() == b"abb"


def test_errors() -> None:
    plant("save.write:1:enospc,save.write:2:oom")
    with pytest.raises(OSError, match="No space left") as caught:
        fault("save.write")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(MemoryError):
        fault("save.write")


def test_signals_and_sleep() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        plant("step.micro:1:term,step.update:1:sleep:0.02")
        fault("step.micro")
        started = time.monotonic()
        fault("step.update")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert time.monotonic() - started >= 0.02


def test_passings_are_written_down(tmp_path: Path) -> None:
    arm({"TUNESMITH_FAULT_HITS": str(tmp_path / "hits")})
    fault("step.micro")
    fault("log.emit")
    assert (tmp_path / "hits").read_text() == "step.micro\nlog.emit\n"


@pytest.mark.parametrize(
    "text", ["step.micro", "nowhere:1:kill", "step.micro:1:dance", "step.micro::kill"]
)
def test_what_cannot_be_planted(text: str) -> None:
    with pytest.raises(ValueError, match="is not point:when:action"):
        parse_faults(text)


def test_a_condition_that_is_none() -> None:
    plant("step.micro:now:kill")
    with pytest.raises(ValueError, match="is no condition"):
        fault("step.micro")


def test_all_is_described() -> None:
    assert all(POINTS.values())
    assert all(ACTIONS.values())
