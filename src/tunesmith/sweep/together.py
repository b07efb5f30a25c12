"""Several trials in one process, around one frozen base: they take turns, a step each.

So they are at the same point when they are compared, and one base serves all. At any time one of
them works: numbers are those of separate runs, because each step seeds its own random numbers
(`engine.rng.seed_step`). Not the same are peaks of memory, which are those of the process.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tunesmith.config.load import LoadedRecipe
from tunesmith.engine.signals import StopSignal
from tunesmith.errors import Interrupted
from tunesmith.sweep.shared import SharedBase
from tunesmith.sweep.study import Study
from tunesmith.sweep.trial import TrialStop, Watcher, run_trial
from tunesmith.types import Event


class Turns:
    """Whose turn it is: one after the other, those that have left are passed over."""

    def __init__(self, names: Sequence[int]) -> None:
        self._waiting = list(names)
        self._changed = threading.Condition()

    def wait(self, name: int) -> None:
        """Comes back when it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == name)

    def pass_on(self, name: int) -> None:
        """Lets all others have a turn first."""
        with self._changed:
            self._waiting.remove(name)
            self._waiting.append(name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting[0] == name)

    def leave(self, name: int) -> None:
        """Takes no more turns."""
        with self._changed:
            self._waiting.remove(name)
            self._changed.notify_all()


M_ARENA_MAX = -8
"""Of mallopt(3)."""


def share_heap() -> None:
    """Lets all threads allocate from one heap; later threads alone, and glibc alone.

    Else what a step needs stays with the thread of the trial that made it: four trials on
    SmolLM2-135M took 3.1 GiB so. They take turns, so that nobody waits for the heap.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@dataclass
class Group:
    """Trials that train in turns, and how each of them ended."""

    loaded: LoadedRecipe
    study: Study
    base: SharedBase
    watcher: Watcher
    is_over: Callable[[], bool]
    turns: Turns
    stops: dict[int, TrialStop]
    are_done: list[bool] = field(default_factory=list[bool])
    errors: list[BaseException] = field(default_factory=list[BaseException])

    def stop(self) -> None:
        """Asks all to save and stop."""
        for stop in self.stops.values():
            stop.ask()

    def work(self, number: int) -> None:
        """Trains one trial, in a thread of its own."""
        waited_seconds = 0.0

        def give_turn(event: Event) -> None:
            nonlocal waited_seconds
            if event.kind in ("step", "evaluation"):
                began = time.monotonic()
                self.turns.pass_on(number)
                waited_seconds += time.monotonic() - began

        self.turns.wait(number)
        # Not ours to judge here: it is raised again by the thread that can end the sweep.
        try:
            done = run_trial(
                self.loaded,
                self.study,
                number,
                watcher=self.watcher,
                is_over=self.is_over,
                stop=self.stops[number],
                load=self.base.load,
                listeners=(give_turn,),
                clock=lambda: time.monotonic() - waited_seconds,
            )
            self.are_done.append(done)
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            self.errors.append(error)
            self.stop()
        finally:
            self.turns.leave(number)


def run_together(
    loaded: LoadedRecipe,
    study: Study,
    numbers: Sequence[int],
    base: SharedBase,
    *,
    watcher: Watcher,
    is_over: Callable[[], bool],
) -> bool:
    """Trains several trials in turns; False if time was up before their end.

    Raises:
        Interrupted: a signal came; all are saved.
        Exception: what one of them raised, when the others have stopped.
    """
    stops = {number: TrialStop(str(study.folder_of(number))) for number in numbers}
    group = Group(loaded, study, base, watcher, is_over, Turns(numbers), stops)
    share_heap()
    with StopSignal(str(study.folder)) as outer, outer.deferred():
        threads = [threading.Thread(target=group.work, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.05)
            if outer.received is not None:
                group.stop()
    # A trial that was stopped because of another one, or of a signal, says less than these.
    first = sorted(group.errors, key=lambda error: isinstance(error, Interrupted))[:1]
    if outer.received is not None and (not first or isinstance(first[0], Interrupted)):
        raise Interrupted(outer.received, str(study.folder), step=None)
    for error in first:
        raise error
    return all(group.are_done)
