"""`--auto-restart`: which ends of a child lead to another one, and what passes through to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli import supervise
from tunesmith.cli.supervise import (
    SUPERVISOR_VARIABLE,
    Crash,
    end_with_supervisor,
    find_crash,
    own_arguments,
    run_supervised,
    why_not_again,
)
from tunesmith.engine.watchdog import Heartbeat

# A child takes its fate from the n-th line of a script: `step` writes a heartbeat, the rest is how
# it ends. It imports nothing of ours: that is what takes time.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder, *fates = sys.argv[1:]
folder = Path(folder)
attempt = int(os.environ["TUNESMITH_ATTEMPT"])
with (folder / "calls").open("a") as file:
    file.write(f"{attempt} {' '.join(fates)}\\n")
fates = [fate for fate in fates if not fate.startswith("--")]
for word in fates[attempt].split("+"):
    name, _, value = word.partition("=")
    if name == "step":
        beat = {"pid": os.getpid(), "phase": "step", "step": int(value), "time": time.time(),
                "places": ["data.jsonl:17", "data.jsonl:18"], "stop_seconds": STOP_SECONDS}
        (folder / "heartbeat.json").write_text(json.dumps(beat))
    elif name == "exit":
        sys.exit(int(value))
    elif name == "signal":
        os.kill(os.getpid(), int(value))
    elif name == "checkpoint":
        (folder / "checkpoints" / f"step-{int(value):08d}").mkdir(parents=True)
    elif name == "catch":
        def count(number, frame):
            with (folder / "signals").open("a") as file:
                file.write(f"{signal.Signals(number).name}\\n")
        for each in value.split("/"):
            signal.signal(getattr(signal, each), count)
    elif name == "wait":
        (folder / "ready").touch()
        end = time.monotonic() + 20
        while not (folder / value).exists() and time.monotonic() < end:
            time.sleep(0.01)
"""


def child(stop_seconds: float | None = None) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", CHILD.replace("STOP_SECONDS", str(stop_seconds))]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    def start(*fates: str, restarts: int = 3, **changes: Any) -> int:
        return run_supervised(
            [str(tmp_path), *fates],
            tmp_path,
            restarts=restarts,
            **{"command": child(), "first_pause_seconds": 0.001, **changes},
        )

    return start


def attempts(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 129, 130, 143])
def test_final_codes_are_passed_on(run: Callable[..., int], tmp_path: Path, code: int) -> None:
    assert run(f"step=3+exit={code}") == code
    assert attempts(tmp_path) == 1


def test_crashes_are_started_again_while_steps_advance(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fates = ("step=3+exit=1", "step=4+exit=75", "step=9+signal=9", "step=20+exit=0")
    assert run(*fates) == 0
    assert attempts(tmp_path) == 4
    lines = capfd.readouterr().err.splitlines()
    samples = "samples data.jsonl:17, data.jsonl:18"
    assert lines == [
        f"tunesmith: failed (exit code 1) in phase step at step 3, {samples};"
        " restart 1 of 3 in 0.001 s",
        f"tunesmith: hung (exit code 75) in phase step at step 4, {samples};"
        " restart 2 of 3 in 0.002 s",
        f"tunesmith: killed by SIGKILL in phase step at step 9, {samples};"
        " restart 3 of 3 in 0.004 s",
    ]


def test_the_same_failure_twice_is_not_tried_again(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("step=7+exit=1", "step=812+exit=1", "step=812+exit=1", "exit=0", restarts=9) == 1
    assert attempts(tmp_path) == 3
    assert (
        "tunesmith: the same failure twice at step 812, samples data.jsonl:17, data.jsonl:18:"
        " failed (exit code 1) in phase step; not started again"
    ) in capfd.readouterr().err


def test_no_restart_is_left(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fates = ("step=1+exit=75", "step=2+exit=75", "step=3+exit=75")
    assert run(*fates, restarts=2) == 75
    assert attempts(tmp_path) == 3
    assert "hung (exit code 75) in phase step at step 3" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM])
def test_a_death_by_a_signal_that_was_not_passed_on_is_a_crash(
    run: Callable[..., int], tmp_path: Path, number: int
) -> None:
    assert run(f"step=1+signal={number}", restarts=0) == 1
    assert run(f"step=1+signal={number}", "exit=0", restarts=1) == 0
    assert attempts(tmp_path) == 3


def test_checkpoints_are_progress_and_an_old_heartbeat_is_none(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fates = ("step=5+exit=1", "checkpoint=6+exit=1", "exit=1", "exit=0")
    assert run(*fates, restarts=9) == 1
    assert attempts(tmp_path) == 3
    error = capfd.readouterr().err
    assert "failed (exit code 1) at step 6; restart 2 of 9" in error
    assert "the same failure twice at step 6: failed (exit code 1); not" in error


def test_the_newest_checkpoint_counts(tmp_path: Path) -> None:
    for name in ("step-00000004", "step-00000011", "step-00000012.corrupt", "step-x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_crash(tmp_path, 1, 1) == Crash(1, 11, None)
    assert find_crash(tmp_path / "none", 1, 1) == Crash(1, 0, None)


def test_reasons() -> None:
    beat = Heartbeat(1, "save", 8, (), 0.0, 60.0)
    crash = Crash(137, 8, beat)
    assert (crash.kind, crash.place) == ("killed by SIGKILL in phase save", "step 8")
    assert why_not_again(crash, None, restarts_left=1) is None
    assert why_not_again(crash, Crash(1, 7, None), restarts_left=1) is None
    back = why_not_again(crash, Crash(1, 9, None), restarts_left=1)
    assert back is not None
    assert "the failure before was at step 9: no progress" in back
    other = why_not_again(crash, Crash(75, 8, None), restarts_left=1)
    assert other is not None
    assert other.startswith("failures twice at step 8: killed by SIGKILL in phase save")


def test_the_child_is_not_a_supervisor_itself() -> None:
    expected = ["--debug", "train", "recipe.yaml", "output=x", "--restart"]
    for option in (["--auto-restart", "3"], ["--auto-restart=3"]):
        given = ["--debug", "train", *option, "recipe.yaml", "output=x", *option, "--restart"]
        assert own_arguments(given) == expected
    assert own_arguments([*expected, "--auto-restart"]) == expected


def test_train_anew_is_said_until_a_child_has_begun(
    run: Callable[..., int], tmp_path: Path
) -> None:
    fates = ("exit=1", "step=4+exit=1", "exit=0")
    assert run(*fates, "--restart") == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.endswith("--restart") for call in calls] == [True, True, False]


def test_the_pause_grows_to_a_minute(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []

    def sleep(relay: supervise.SignalRelay, seconds: float) -> bool:
        slept.append(seconds)
        return True

    monkeypatch.setattr(supervise.SignalRelay, "sleep", sleep)
    fates = [f"step={step}+exit=1" for step in range(1, 9)]
    assert run(*fates, "exit=0", restarts=8, first_pause_seconds=1.0) == 0
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]


# Signals


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """A supervisor as a process of its own, when its child is ready."""

    def begin(*fates: str, pause: float = 0.001) -> subprocess.Popen[bytes]:
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from tunesmith.cli.supervise import run_supervised\n"
            f"sys.exit(run_supervised({[str(tmp_path), *fates]!r}, Path({str(tmp_path)!r}),"
            f" restarts=3, command={child()!r}, first_pause_seconds={pause}))"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        wait_for(tmp_path / "ready")
        return process

    return begin


def wait_for(path: Path, lines: int = 0) -> None:
    end = time.monotonic() + 20
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)


def test_signals_reach_the_child_as_often_as_they_come(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    signals = ["SIGUSR1", "SIGUSR1", "SIGHUP", "SIGINT", "SIGTERM"]
    with start("catch=SIGUSR1/SIGHUP/SIGINT/SIGTERM+wait=go+exit=130") as process:
        for index, name in enumerate(signals, 1):
            process.send_signal(getattr(signal, name))
            wait_for(tmp_path / "signals", index)
        (tmp_path / "go").touch()
        assert process.wait(20) == 130
    assert (tmp_path / "signals").read_text().split() == signals


@pytest.mark.slow
def test_who_was_asked_to_stop_is_not_started_again(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    with start("step=3+wait=never", "exit=0") as process:
        process.terminate()
        assert process.wait(20) == 143
    assert attempts(tmp_path) == 1


@pytest.mark.slow
def test_a_stop_in_the_pause_ends_it(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    with start("step=3+wait=go+exit=1", "exit=0", pause=30.0) as process:
        assert process.stderr is not None
        assert b"restart 1 of 3 in 30 s" in process.stderr.readline()
        process.send_signal(signal.SIGUSR1)  # nobody is there who could save
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert attempts(tmp_path) == 1


@pytest.mark.slow
def test_ctrl_z_stops_the_child_too(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    with start("step=3+wait=go+exit=0") as process:
        beat = supervise.read_heartbeat(tmp_path)
        assert beat is not None
        process.send_signal(signal.SIGTSTP)
        wait_for_state(beat.pid, "T")
        wait_for_state(process.pid, "T")
        process.send_signal(signal.SIGCONT)
        wait_for_state(beat.pid, "SR")
        (tmp_path / "go").touch()
        assert process.wait(20) == 0


def wait_for_state(pid: int, states: str) -> None:
    """Waits until /proc says so; an ended process has the state `-`."""
    end = time.monotonic() + 20
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            state = "-"
        if state in states:
            return
        assert time.monotonic() < end, f"{pid} is {state}, not {states}"
        time.sleep(0.01)


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with supervise.SignalRelay() as relay:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert relay.stops == [signal.SIGTERM]
            assert not relay.sleep(60)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_child_that_cannot_end_itself_is_killed(
    run: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.05)
    command = child(stop_seconds=0.1)
    assert run("step=3+wait=never", "step=9+exit=0", command=command) == 0
    error = capfd.readouterr().err
    assert "no heartbeat (phase step, step 3, samples data.jsonl:17, data.jsonl:18)" in error
    assert "killed by SIGKILL in phase step at step 3" in error


# The supervisor's death

ORPHAN = (
    "from tunesmith.cli.supervise import end_with_supervisor\n"
    "import os, sys, time\nfrom pathlib import Path\n"
    "end_with_supervisor()\n"
    "Path(sys.argv[1], 'pid').write_text(f'{os.getpid()}\\n')\n"
    "time.sleep(30)\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_a_child_ends_with_its_supervisor(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tunesmith.cli.supervise import run_supervised\n"
        f"run_supervised([{str(tmp_path)!r}], Path({str(tmp_path)!r}), restarts=3,"
        f" command=[sys.executable, '-c', {ORPHAN!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_for(tmp_path / "pid", 1)
        process.kill()
    wait_for_state(int((tmp_path / "pid").read_text()), "-Z")


def test_a_child_whose_supervisor_is_dead_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: None) -> None: ...

        def prctl(self, option: int, number: int) -> None:
            asked.append((option, number))

    monkeypatch.setattr(supervise.ctypes, "CDLL", Library)
    monkeypatch.setattr(supervise.os, "kill", lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(supervise.sys, "platform", "linux")
    monkeypatch.setenv(SUPERVISOR_VARIABLE, "1073741824")
    end_with_supervisor()
    assert asked == [(1, signal.SIGTERM)]
    assert sent == [(os.getpid(), signal.SIGTERM)]
    end_with_supervisor()  # its own children do not take it for theirs
    assert len(asked) == 1
    monkeypatch.setenv(SUPERVISOR_VARIABLE, str(os.getppid()))
    end_with_supervisor()
    assert (len(asked), len(sent)) == (2, 1)
    monkeypatch.setenv(SUPERVISOR_VARIABLE, "1")
    monkeypatch.setattr(supervise.sys, "platform", "darwin")
    end_with_supervisor()
    assert len(asked) == 2
