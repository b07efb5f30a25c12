"""Runs of the `tunesmith` command in children that may be killed: each starts in milliseconds.

A fork server imports torch and tunesmith once; a run is a fork of it. `oracle` is the uninterrupted
run that every mended one must equal, byte by byte.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "tunesmith.cli.main",
    "tunesmith.cli.train",
    "tunesmith.train",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
]
SECONDS = 60
KILLED = -signal.SIGKILL


def _work(arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Is the child: becomes the command, with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
    os.environ.update(environment)
    if "TEST_FILE_LIMIT" in environment:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
        most = int(environment["TEST_FILE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if "TEST_MEMORY_LIMIT" in environment:
        most = int(environment["TEST_MEMORY_LIMIT"])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    from tunesmith.cli.main import main
    from tunesmith.io.fault import arm

    arm()
    # The server may have been started by a test runner that ignores or blocks signals.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = ["tunesmith", *arguments]
    try:
        main()
    finally:
        if "TEST_SAY_ADDRESS_SPACE" in environment:
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            print(next(line for line in status if line.startswith("VmPeak")))


@dataclass
class Child:
    """A command under way."""

    process: ForkServerProcess
    log: Path

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code once it ends; negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output[-3000:]}")
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, pattern: str, file: Path, seconds: float = SECONDS) -> None:
        """Waits until a file holds something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if file.exists() and re.search(pattern, file.read_text(errors="replace")):
                return
            if self.process.exitcode is not None:
                break
            time.sleep(0.002)
        raise TimeoutError(f"no {pattern!r} in {file}:\n{self.output[-3000:]}")


def start(*arguments: str, log: Path, fault: str = "", **environment: str) -> Child:
    """Starts `tunesmith` with these arguments and a planted fault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    values = {
        **{name: os.environ[name] for name in ("TUNESMITH_CACHE",) if name in os.environ},
        "TUNESMITH_FAULT": fault,
        "COLUMNS": "200",
        **environment,
    }
    process = context.Process(target=_work, args=(arguments, values, str(log)))
    process.start()
    return Child(process, log)


def tunesmith(*arguments: str, log: Path, fault: str = "", **environment: str) -> int:
    """Runs it to its end; gives its exit code."""
    return start(*arguments, log=log, fault=fault, **environment).wait()


@dataclass(frozen=True)
class Place:
    """One run directory, its recipe, and the command that trains there."""

    recipe: Path
    output: Path

    @property
    def log(self) -> Path:
        """What all starts printed."""
        return self.output.with_suffix(".log")

    @property
    def printed(self) -> str:
        """What all starts printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def start(self, *more: str, fault: str = "", **environment: str) -> Child:
        """Begins to train here."""
        arguments = ("train", str(self.recipe), f"output={self.output}", *more)
        return start(*arguments, log=self.log, fault=fault, **environment)

    def train(self, *more: str, fault: str = "", **environment: str) -> int:
        """Trains here; gives the exit code."""
        return self.start(*more, fault=fault, **environment).wait()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, as they were written."""
        lines = (self.output / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(p for p in (self.output / "checkpoints").glob("step-*") if p.suffix == "")

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each step, of its last run."""
        return {event["step"]: event["loss"] for event in self.events_of("step")}

    def final_bytes(self) -> dict[str, bytes]:
        """Weights and optimizer of the last checkpoint, and the result."""
        files = [
            *self.checkpoints[-1].glob("*.safetensors"),
            *(self.output / "model").glob("*.safetensors"),
        ]
        assert len(files) == 3, files
        return {str(file.relative_to(self.output)): file.read_bytes() for file in files}


def train_to_the_end(place: Place, *more: str) -> None:
    """Trains here without any fault; it must finish."""
    code = place.train(*more)
    assert code == 0, f"exit code {code}:\n{place.printed[-3000:]}"


def count_points(hits: Path) -> Counter[str]:
    """How often each point was passed."""
    return Counter(hits.read_text(encoding="ascii").split())


Plan = Callable[[Place], None]
