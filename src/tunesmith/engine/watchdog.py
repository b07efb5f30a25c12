"""Notices when a run hangs, says where, and ends it, so that it can be started again.

`heartbeat.json` in the run directory says what is being done: after a SIGKILL, too, it names the
step and the samples that were at work. `stacks-<pid>.txt` says where every thread stood.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

HEARTBEAT: Final = "heartbeat.json"

HUNG_EXIT_CODE: Final = 75
"""What a hung run ends with: EX_TEMPFAIL, worth another try."""

MAX_PLACES: Final = 8
"""How many samples are named."""

LINE_BYTES: Final = 4096
"""Size of the heartbeat: one page of the page cache, which a killed write leaves whole."""

REPORT_SECONDS: Final = 5.0
"""How long a report of a hang may take before it is given up."""

STDERR: Final = 2


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a process was doing.

    Args:
        pid: the process.
        phase: start, load, data, step, evaluation or save.
        step: how many steps were done.
        places: `file:line` of the samples at work, the first of them.
        time: when it began, seconds since 1970.
        stop_seconds: after how long it counts as hung; None while nothing is watched.
    """

    pid: int
    phase: str
    step: int
    places: tuple[str, ...]
    time: float
    stop_seconds: float | None

    def __str__(self) -> str:
        samples = f", samples {', '.join(self.places)}" if self.places else ""
        return f"phase {self.phase}, step {self.step}{samples}"


FIELDS: Final = tuple(field.name for field in fields(Heartbeat))


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """The last heartbeat of a run directory; None if there is none, or nothing readable."""
    with suppress(OSError, ValueError, TypeError):
        values: dict[str, Any] = json.loads((folder / HEARTBEAT).read_bytes())
        beat = Heartbeat(**values)
        return replace(beat, step=int(beat.step), places=tuple(map(str, beat.places)))
    return None


class Watchdog:
    """Notices when a run hangs: dumps the stacks of all threads, later ends the process (exit 75).

    It watches from a thread of its own, so a main thread that waits for a lock, sleeps, or is in a
    C call that releases the GIL is noticed. Only time in which the process ran is counted: a clock
    that is set, a machine that sleeps and a process that is stopped (Ctrl-Z) are no hangs.

    Not covered: a C call that keeps the GIL keeps the watching thread from running, too. Then
    `faulthandler` writes the stacks to stderr after one and a half times `stop_seconds`, but
    nothing ends the process from within: a timer that ends it would also kill a run that was only
    stopped for that long. A supervisor that reads the heartbeat ends it (`--auto-restart`).

    Args:
        folder: the run directory.
        warn_seconds: after how long without a beat the stacks are dumped. After an alarm that was
            none (the run went on) twice as long, so slow steps do not warn again and again.
        stop_seconds: after how long the process is ended.
        note: says a text to the user. It is called in another thread; it may hang itself.
    """

    def __init__(
        self,
        folder: Path,
        *,
        warn_seconds: float,
        stop_seconds: float,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._warn_seconds = warn_seconds
        self._stop_seconds = stop_seconds
        self._note = note
        self._pid = os.getpid()
        self._descriptor: int | None = None
        # Replaced as a whole: the watching thread needs no lock, which a stuck thread could hold.
        self._beat: Heartbeat | None = None
        self._last = Heartbeat(self._pid, "start", 0, (), time.time(), None)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def step(self) -> int:
        """How many steps were done at the last beat."""
        return self._last.step

    def __enter__(self) -> Watchdog:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / HEARTBEAT, flags, 0o644)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if kind is None:  # after an error it says what was at work
            (self._folder / HEARTBEAT).unlink(missing_ok=True)

    def beat(
        self, phase: str, step: int | None = None, places: Sequence[str] | None = None
    ) -> None:
        """Something was done; a few microseconds.

        Args:
            phase: what begins now: load, data, step, evaluation or save.
            step: how many steps are done; None if they are as many as before.
            places: `file:line` of the samples at work, of which the first MAX_PLACES are kept. None
                if they are the same as before; a new phase or step has none then.
        """
        before = self._last
        step = before.step if step is None else step
        if places is None:
            places = before.places if (before.phase, before.step) == (phase, step) else ()
        names = tuple(places[:MAX_PLACES])
        self._last = Heartbeat(self._pid, phase, step, names, time.time(), self._stop_seconds)
        self._beat = self._last
        self._write(self._beat)

    @contextmanager
    def during(self, phase: str, step: int | None = None) -> Generator[None]:
        """Something that comes between, as a save; after it the beat before counts again.

        So a run that fails and saves with its last words still names the samples it failed at.
        """
        before = self._last
        self.beat(phase, step)
        try:
            yield
        finally:
            self.beat(before.phase, before.step, before.places)

    def pause(self) -> None:
        """Nothing is watched until the next beat, e.g. during an export."""
        self._beat = None
        self._write(replace(self._last, stop_seconds=None))

    def _write(self, beat: Heartbeat) -> None:
        if self._descriptor is None:
            return
        line = _line(beat)
        # The heartbeat is a help: a full disk shall not stop the run here.
        with suppress(OSError):
            os.pwrite(self._descriptor, line, 0)

    def _watch(self) -> None:
        limits = (self._warn_seconds, self._stop_seconds)
        interval = min(1.0, *(limit / 8 for limit in limits))
        clock = _Clock(longest_seconds=4 * interval)
        second_line = _SecondLine(1.5 * self._stop_seconds, every_seconds=min(5.0, 4 * interval))
        seen: Heartbeat | None = None
        warn_after = self._warn_seconds
        quiet_seconds, is_warned = 0.0, False
        try:
            while not self._is_over.wait(interval):
                passed = clock.passed()
                beat = self._beat
                second_line.renew(passed, is_armed=beat is not None)
                if beat is not seen or beat is None:
                    seen, quiet_seconds = beat, 0.0
                    warn_after *= 2 if is_warned else 1
                    is_warned = False
                    continue
                quiet_seconds += passed
                if quiet_seconds >= self._stop_seconds:
                    self._stop(beat, quiet_seconds)
                if quiet_seconds >= warn_after and not is_warned:
                    is_warned = True
                    self._report(beat, f"the run hangs: nothing done for {quiet_seconds:.1f} s")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _stop(self, beat: Heartbeat, quiet_seconds: float) -> None:
        try:
            said = f"the run is ended, exit code {HUNG_EXIT_CODE}: it can be started again"
            self._report(beat, f"the run hangs: nothing done for {quiet_seconds:.1f} s; {said}")
        finally:
            # A hung thread cannot be ended. Saves are atomic, so nothing half-written is visible.
            os._exit(HUNG_EXIT_CODE)

    def _report(self, beat: Heartbeat, text: str) -> None:
        # In a thread of its own: the disk or the log may be what hangs; the end must still come.
        arguments = (beat, text)
        reporting = threading.Thread(target=self._write_report, args=arguments, daemon=True)
        reporting.start()
        reporting.join(REPORT_SECONDS)

    def _write_report(self, beat: Heartbeat, text: str) -> None:
        path = self._folder / f"stacks-{self._pid}.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{beat}: {text} ({time.strftime('%Y-%m-%d %H:%M:%S %z')})\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            found = f"where each thread stands: {path}"
        except OSError as error:
            found = f"{path} could not be written ({error.strerror})"
        self._note(f"{beat}: {text}; {found}")


def _line(beat: Heartbeat) -> bytes:
    # By hand: dataclasses.asdict takes four times as long as all the rest of a beat.
    values = {name: getattr(beat, name) for name in FIELDS}
    line = json.dumps(values)
    if len(line) >= LINE_BYTES:  # very long paths
        line = json.dumps({**values, "places": []})
    return line.ljust(LINE_BYTES - 1).encode("ascii") + b"\n"


class _Clock:
    """Time in which this process ran, from one look to the next.

    Args:
        longest_seconds: what counts at most; longer means that the process was stopped or starved.
    """

    def __init__(self, *, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self._last = time.monotonic()

    def passed(self) -> float:
        """Seconds since the last look."""
        last, self._last = self._last, time.monotonic()
        return min(self._last - last, self._longest_seconds)


class _SecondLine:
    """Dumps the stacks to stderr from C when the watching thread itself can no longer run.

    Args:
        seconds: after how long.
        every_seconds: how often it is put off; that starts a thread, so not at every look.
    """

    def __init__(self, seconds: float, *, every_seconds: float) -> None:
        self._seconds = seconds
        self._every_seconds = every_seconds
        self._passed = every_seconds

    def renew(self, passed: float, *, is_armed: bool) -> None:
        """Puts it off; does nothing most of the time."""
        self._passed += passed
        if not is_armed:
            faulthandler.cancel_dump_traceback_later()
            self._passed = self._every_seconds
        elif self._passed >= self._every_seconds:
            self._passed = 0.0
            faulthandler.dump_traceback_later(self._seconds, file=STDERR)
