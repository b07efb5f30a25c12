"""The watchdog: what it says of a run that hangs, when, and how the process ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.engine import watchdog
from tunesmith.engine.watchdog import HEARTBEAT, Heartbeat, Watchdog, read_heartbeat


class Ended:
    """Stands in for the end of the process, which goes on."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.came = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.came.set()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    ended = Ended()
    monkeypatch.setattr(watchdog.os, "_exit", ended)
    return ended


def make(folder: Path, said: list[str], warn: float = 60.0, stop: float = 600.0) -> Watchdog:
    return Watchdog(folder, warn_seconds=warn, stop_seconds=stop, note=said.append)


def wait_for(is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def stacks_of(folder: Path) -> str:
    (path,) = folder.glob("stacks-*.txt")
    return path.read_text()


# The heartbeat


def test_a_beat_can_be_read_by_another_process(tmp_path: Path) -> None:
    with make(tmp_path, []) as dog:
        dog.beat("step", 812, ["data.jsonl:17", "daten ä.jsonl:3"])
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        assert abs(beat.time - time.time()) < 60
        places = ("data.jsonl:17", "daten ä.jsonl:3")
        assert beat == Heartbeat(os.getpid(), "step", 812, places, beat.time, 600.0)
        assert str(beat) == "phase step, step 812, samples data.jsonl:17, daten ä.jsonl:3"


def test_samples_and_step_stay_until_something_else_begins(tmp_path: Path) -> None:
    def now() -> tuple[Any, ...]:
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        return beat.phase, beat.step, beat.places

    with make(tmp_path, []) as dog:
        dog.beat("step", 3, ["a:1"])
        dog.beat("step", 3)
        assert now() == ("step", 3, ("a:1",))
        dog.beat("step")
        assert now() == ("step", 3, ("a:1",))
        dog.beat("evaluation")
        assert now() == ("evaluation", 3, ())
        dog.beat("step", 4, ["a:1"])
        dog.beat("step", 5)
        assert now() == ("step", 5, ())
        assert dog.step == 5


def test_what_comes_between_leaves_the_beat_before(tmp_path: Path) -> None:
    def save(dog: Watchdog) -> None:
        with dog.during("save", 4):
            assert str(read_heartbeat(tmp_path)) == "phase save, step 4"
            raise RuntimeError

    with make(tmp_path, []) as dog:
        dog.beat("step", 3, ["a:1"])
        with pytest.raises(RuntimeError):
            save(dog)
        assert str(read_heartbeat(tmp_path)) == "phase step, step 3, samples a:1"


def test_a_shorter_beat_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    with make(tmp_path, []) as dog:
        dog.beat("evaluation", 10**9, ["x" * 300] * 20)
        text = (tmp_path / HEARTBEAT).read_text()
        assert len(json.loads(text)["places"]) == 8
        dog.beat("step", 1)
        text = (tmp_path / HEARTBEAT).read_text()
        assert len(text) == 4096
        assert json.loads(text)["step"] == 1
        assert text.endswith(" \n")


def test_endless_paths_are_left_out(tmp_path: Path) -> None:
    with make(tmp_path, []) as dog:
        dog.beat("step", 1, ["x" * 5000])
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        assert (beat.step, beat.places) == (1, ())


def test_paused_says_so(tmp_path: Path) -> None:
    with make(tmp_path, []) as dog:
        dog.beat("save", 7)
        dog.pause()
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        assert (beat.phase, beat.step, beat.stop_seconds) == ("save", 7, None)


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"pid": 1}', "[]", "7", '{"a": 1}', "\x00" * 4096, '{"pid": 1, "phase": "step"'],
)
def test_torn_content_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / HEARTBEAT).write_text(content)
    assert read_heartbeat(tmp_path) is None


def test_wrong_types_are_none(tmp_path: Path) -> None:
    good = {"pid": 1, "phase": "step", "step": 1, "places": [], "time": 0.0, "stop_seconds": 1.0}
    for wrong in ({"step": "x"}, {"step": None}, {"places": 3}):
        (tmp_path / HEARTBEAT).write_text(json.dumps({**good, **wrong}))
        assert read_heartbeat(tmp_path) is None
    (tmp_path / HEARTBEAT).write_text(json.dumps(good))
    assert read_heartbeat(tmp_path) == Heartbeat(1, "step", 1, (), 0.0, 1.0)


def test_no_folder_no_heartbeat(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path / "none") is None


def test_the_heartbeat_goes_when_all_is_done_and_stays_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), make(tmp_path, []) as dog:
        dog.beat("step", 5)
        raise RuntimeError
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert beat.step == 5
    with make(tmp_path, []) as dog:
        dog.beat("step", 6)
    assert read_heartbeat(tmp_path) is None
    dog.beat("step", 7)  # outside of the block nothing is written
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_stop_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    with make(tmp_path, []) as dog:
        with monkeypatch.context() as patch:
            patch.setattr(watchdog.os, "pwrite", fail)
            dog.beat("step", 5)
        dog.beat("step", 6)
        beat = read_heartbeat(tmp_path)
        assert beat is not None
        assert beat.step == 6


# Hangs


def test_a_hang_is_said_with_stacks_and_ended(tmp_path: Path, ended: Ended) -> None:
    said: list[str] = []
    with make(tmp_path, said, warn=0.1, stop=0.5) as dog:
        dog.beat("data", 3, ["data.jsonl:17"])
        assert ended.came.wait(10)
    assert ended.codes[0] == 75
    first, last = said[:2]
    path = tmp_path / f"stacks-{os.getpid()}.txt"
    assert first.startswith("phase data, step 3, samples data.jsonl:17: the run hangs: nothing")
    assert first.endswith(f"where each thread stands: {path}")
    assert "exit code 75" in last
    text = stacks_of(tmp_path)
    assert text.startswith("phase data, step 3, samples data.jsonl:17: the run hangs")
    assert text.count("nothing done for") >= 2
    assert "test_a_hang_is_said_with_stacks_and_ended" in text
    assert "ended.came.wait" not in text  # places, no source: that would be read from disk


def test_nothing_is_said_while_beats_come(tmp_path: Path, ended: Ended) -> None:
    said: list[str] = []
    with make(tmp_path, said, warn=0.3, stop=0.4) as dog:
        for step in range(25):
            dog.beat("step", step)
            time.sleep(0.02)
    assert (said, ended.codes) == ([], [])


def test_nothing_is_watched_before_the_first_beat_and_in_a_pause(
    tmp_path: Path, ended: Ended
) -> None:
    said: list[str] = []
    with make(tmp_path, said, warn=0.05, stop=0.1) as dog:
        time.sleep(0.2)
        dog.beat("step", 1)
        dog.pause()
        time.sleep(0.2)
    assert (said, ended.codes) == ([], [])


def test_after_a_false_alarm_the_limit_doubles(tmp_path: Path, ended: Ended) -> None:
    said: list[str] = []
    with make(tmp_path, said, warn=0.1, stop=60) as dog:
        dog.beat("step", 1)
        wait_for(lambda: len(said) == 1)
        time.sleep(0.05)  # a second warning of the same hang would come here
        began = time.monotonic()
        dog.beat("step", 2)
        wait_for(lambda: len(said) == 2)
        assert time.monotonic() - began >= 0.18
    assert "step 2" in said[1]
    assert ended.codes == []


def test_stacks_that_cannot_be_written_are_said_and_the_end_comes(
    tmp_path: Path, ended: Ended
) -> None:
    (tmp_path / f"stacks-{os.getpid()}.txt").mkdir()
    said: list[str] = []
    with make(tmp_path, said, warn=60, stop=0.1) as dog:
        dog.beat("save", 3)
        assert ended.came.wait(10)
    assert ended.codes[0] == 75
    assert "could not be written (Is a directory)" in said[0]


def test_a_log_that_hangs_does_not_keep_the_end_from_coming(
    tmp_path: Path, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.05)
    released = threading.Event()
    dog = Watchdog(
        tmp_path, warn_seconds=0.05, stop_seconds=0.1, note=lambda _: assert_set(released)
    )
    with dog:
        dog.beat("step", 3)
        assert ended.came.wait(10)
        released.set()
    assert ended.codes[0] == 75


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


# Processes that hang

CHILD = """
import ctypes, sys, time
from pathlib import Path
from tunesmith.engine.watchdog import Watchdog
def hang():
    {hang}
with Watchdog(Path(sys.argv[1]), warn_seconds={warn}, stop_seconds={stop}, note=print) as dog:
    dog.beat("data", 3, ["data.jsonl:17"])
    hang()
"""


def child(folder: Path, hang: str, *, warn: float, stop: float) -> list[str]:
    return [sys.executable, "-c", CHILD.format(hang=hang, warn=warn, stop=stop), str(folder)]


# Each waits for a lock, and in C code that has released the GIL.
LOCK = "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()"
C_CALL = "ctypes.CDLL(None).sleep(60)"


@pytest.mark.parametrize("hang", [LOCK, pytest.param(C_CALL, marks=pytest.mark.slow)])
def test_a_process_that_hangs_ends_with_75(tmp_path: Path, hang: str) -> None:
    command = child(tmp_path, hang, warn=0.1, stop=0.2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 75, done.stderr
    assert "phase data, step 3, samples data.jsonl:17" in stacks_of(tmp_path)
    assert "in hang" in stacks_of(tmp_path)
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert beat.places == ("data.jsonl:17",)


@pytest.mark.slow
def test_a_call_that_keeps_the_gil_leaves_its_stack_on_stderr(tmp_path: Path) -> None:
    hang = "time.sleep(0.1); ctypes.PyDLL(None).usleep(900_000)"
    command = child(tmp_path, hang, warn=0.2, stop=0.3)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "in hang" in done.stderr
    assert "Timeout (0:00:00.450000)!" in done.stderr
    assert done.returncode == 0, "nothing ends it; it went on by itself"


@pytest.mark.slow
def test_a_stopped_process_does_not_hang(tmp_path: Path) -> None:
    hang = "[(dog.beat('step', step), time.sleep(0.02)) for step in range(40)]"
    command = child(tmp_path, hang, warn=60, stop=1.0)
    with subprocess.Popen(command) as process:
        wait_for(lambda: read_heartbeat(tmp_path))
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.3)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
    assert list(tmp_path.glob("stacks-*")) == []
