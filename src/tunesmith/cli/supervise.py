"""`tunesmith train --auto-restart N`: starts a crashed run again as long as it makes progress."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import typer

from tunesmith.engine.watchdog import HUNG_EXIT_CODE, Heartbeat, read_heartbeat

OPTION: Final = "--auto-restart"

ATTEMPT_VARIABLE: Final = "TUNESMITH_ATTEMPT"
"""Tells a child how many children there were before it."""

SUPERVISOR_VARIABLE: Final = "TUNESMITH_SUPERVISOR"
"""Tells a child the process id of its supervisor."""

COMMAND: Final = (sys.executable, "-m", "tunesmith")

FINAL_CODES: Final = frozenset({0, 2, 3, 4, 5, 6, 7, 129, 130, 143})
"""Finished, refused for a documented reason, or stopped on request: another try would not help."""

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LONGEST_PAUSE_SECONDS: Final = 60.0

LOOK_SECONDS: Final = 1.0
"""How often the heartbeat of a child is read."""

PR_SET_PDEATHSIG: Final = 1
"""Of prctl(2): names the signal that a process gets when its parent dies."""


def run_supervised(
    arguments: Sequence[str],
    output: Path,
    *,
    restarts: int,
    command: Sequence[str] = COMMAND,
    first_pause_seconds: float = 1.0,
) -> int:
    """Runs a command in a child process, and again if it crashes and its steps advance.

    Args:
        arguments: of the command. `--restart` is left out once a child has begun to train anew.
        output: the run directory, whose heartbeat and checkpoints say how far a child came.
        restarts: how many times it is started again at most.
        command: what takes the arguments.
        first_pause_seconds: before the first restart; each later one is twice as long.

    Returns:
        The exit code of the last child. For one that died of a signal: 128 + n if the supervisor
        passed a stop signal on to it, else 1.
    """
    arguments = list(arguments)
    before: Crash | None = None
    attempt = 0
    with SignalRelay() as relay:
        while True:
            crash = _run_child([*command, *arguments], output, attempt, relay)
            if crash.code in FINAL_CODES or relay.stops:
                return crash.code if crash.code >= 0 else 128 - crash.code
            reason = why_not_again(crash, before, restarts_left=restarts - attempt)
            if reason is not None:
                typer.echo(f"tunesmith: {reason}", err=True)
                return max(crash.code, 1)
            seconds = min(LONGEST_PAUSE_SECONDS, first_pause_seconds * 2**attempt)
            which = f"restart {attempt + 1} of {restarts} in {seconds:g} s"
            typer.echo(f"tunesmith: {crash.kind} at {crash.place}; {which}", err=True)
            if not relay.sleep(seconds):
                return 128 + relay.stops[0]
            if crash.heartbeat is not None and "--restart" in arguments:
                arguments.remove("--restart")
            before = crash
            attempt += 1


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without `--auto-restart N`, for the child."""
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == OPTION:
            next(left, None)
        elif not argument.startswith(f"{OPTION}="):
            kept.append(argument)
    return kept


@dataclass(frozen=True)
class Crash:
    """How a child ended.

    Args:
        code: its exit code; negative for a signal.
        step: how many steps were done, as its heartbeat or else the newest checkpoint says.
        heartbeat: its last one; None if it did not get that far.
    """

    code: int
    step: int
    heartbeat: Heartbeat | None

    @property
    def kind(self) -> str:
        """What happened, in words."""
        number = -self.code if self.code < 0 else self.code - 128
        names = {each.value: each.name for each in signal.Signals}
        if self.code == HUNG_EXIT_CODE:
            text = f"hung (exit code {HUNG_EXIT_CODE})"
        elif number in names:
            text = f"killed by {names[number]}"
        else:
            text = f"failed (exit code {self.code})"
        return f"{text} in phase {self.heartbeat.phase}" if self.heartbeat else text

    @property
    def place(self) -> str:
        """The step, and the samples if they are known."""
        places = self.heartbeat.places if self.heartbeat else ()
        return f"step {self.step}" + (f", samples {', '.join(places)}" if places else "")


def find_crash(output: Path, pid: int, code: int) -> Crash:
    """How far a child came that has ended."""
    heartbeat = _heartbeat_of(output, pid)
    names = (path.name.removeprefix("step-") for path in (output / "checkpoints").glob("step-*"))
    steps = [int(name) for name in names if name.isdecimal()]
    if heartbeat is not None:
        steps.append(heartbeat.step)
    return Crash(code, max(steps, default=0), heartbeat)


def why_not_again(crash: Crash, before: Crash | None, *, restarts_left: int) -> str | None:
    """The reason not to start a run again after a crash; None if there is none."""
    if before is not None and crash.step == before.step:
        same = "the same failure twice" if crash.code == before.code else "failures twice"
        advice = "look at these samples with `tunesmith preview`, or at the messages above"
        return f"{same} at {crash.place}: {crash.kind}; not started again\n  try: {advice}"
    if before is not None and crash.step < before.step:
        earlier = f"the failure before was at step {before.step}"
        return f"{crash.kind} at {crash.place}, {earlier}: no progress; not started again"
    if not restarts_left:
        return f"{crash.kind} at {crash.place}; no restart is left"
    return None


class SignalRelay:
    """While entered, passes signals on to a child, each as often as it comes.

    The child has a process group of its own: what the terminal sends (Ctrl-C, Ctrl-Z) reaches it
    through here alone, hence once. `stops` are the stop signals that came.
    """

    def __init__(self) -> None:
        self.stops: list[int] = []
        self._pending: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalRelay:
        for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGTSTP):
            # What is ignored (SIGHUP under nohup) is so in the child, too.
            if signal.getsignal(number) is not signal.SIG_IGN:
                handler = self._suspend if number == signal.SIGTSTP else self._receive
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def attach(self, child: subprocess.Popen[bytes] | None) -> None:
        """From now on signals go to this child, or to none."""
        self._child = child
        self._pass_on()

    def sleep(self, seconds: float) -> bool:
        """Waits; False if a stop signal came."""
        end = time.monotonic() + seconds
        while not self.stops and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return not self.stops

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in STOP_SIGNALS:
            self.stops.append(number)
        # One that stops waits for a child that is just being started; without one, there is nothing
        # to save.
        if number in STOP_SIGNALS or self._child is not None:
            self._pending.append(number)
            self._pass_on()

    def _pass_on(self) -> None:
        while self._child is not None and self._pending:
            self._child.send_signal(self._pending.pop(0))

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)


def end_with_supervisor() -> None:
    """In a supervised child, called first: asks the kernel for SIGTERM when the supervisor dies.

    So the child saves and stops, as for any SIGTERM. Not covered: systems other than Linux, where
    it goes on; the lock of the run directory keeps a second run out of it.
    """
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, None)  # a child of this one has another parent
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it died before it could be watched
        os.kill(os.getpid(), signal.SIGTERM)


def _run_child(command: Sequence[str], output: Path, attempt: int, relay: SignalRelay) -> Crash:
    told = {ATTEMPT_VARIABLE: str(attempt), SUPERVISOR_VARIABLE: str(os.getpid())}
    # The user's own command line, and no shell.
    child = subprocess.Popen(command, env={**os.environ, **told}, process_group=0)  # noqa: S603
    relay.attach(child)
    code = _wait(child, output)
    relay.attach(None)
    return find_crash(output, child.pid, code)


def _wait(child: subprocess.Popen[bytes], output: Path) -> int:
    """Waits for the end of a child, and ends it if it hangs and its own watchdog cannot.

    That is so when a C call keeps the GIL; twice the child's limit is waited.
    """
    seen: Heartbeat | None = None
    num_quiet_looks = 0
    while True:
        try:
            return child.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            beat = _heartbeat_of(output, child.pid)
        num_quiet_looks = num_quiet_looks + 1 if beat == seen else 0
        seen = beat
        limit_seconds = beat.stop_seconds if beat is not None else None
        # Looks are counted, not time: it does not pass for a supervisor that is stopped (Ctrl-Z).
        if limit_seconds is not None and num_quiet_looks * LOOK_SECONDS > 2 * limit_seconds:
            typer.echo(f"tunesmith: no heartbeat ({beat}); the process is killed", err=True)
            child.kill()


def _heartbeat_of(output: Path, pid: int) -> Heartbeat | None:
    beat = read_heartbeat(output)
    return beat if beat is not None and beat.pid == pid else None
