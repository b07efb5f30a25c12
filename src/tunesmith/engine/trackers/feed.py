"""The listener that feeds one tracker from the event stream, through a thread and a queue."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from queue import Full, Queue
from typing import Any, cast

import yaml

from tunesmith.engine.events import read_events
from tunesmith.engine.trackers.base import TrackedRun, Tracker
from tunesmith.engine.trackers.ledger import Ledger
from tunesmith.io.redact import redact, redact_tree
from tunesmith.types import Event, Json

QUEUE_EVENTS = 10_000
"""A tracker that lies so far behind is left alone: at 200 bytes an event they take 2 MB."""
FINISH_SECONDS = 30.0
"""For the rest of the figures at the end of a run."""
STOP_SECONDS = 5.0
"""After a signal: a machine that is taken away gives 30 seconds for all."""

SECTIONS = {"step": "train", "evaluation": "validation"}
"""Under which name a tracker groups the figures of an event."""


class Feed:
    """Feeds one tracker; a failure of it is told once, and ends the feed but not the run.

    Args:
        label: what the tracker is called.
        make: makes the tracker, on the feed's thread: importing its library may take long.
        folder: the run directory.
        warn: tells of a failure; called from the thread of the events.
    """

    def __init__(
        self, label: str, make: Callable[[], Tracker], folder: Path, warn: Callable[[str], None]
    ) -> None:
        self.label = label
        self._make = make
        self._folder = folder
        self._warn = warn
        self._queue: Queue[Event | None] = Queue(QUEUE_EVENTS)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._is_left_alone = False

    def __call__(self, event: Event) -> None:
        """Passes an event on without waiting."""
        if self._is_left_alone:
            return
        if self._failure is not None:
            self._leave_alone(self._failure)
        elif event.kind in ("start", "done", *SECTIONS):
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name=f"tracker-{self.label}", daemon=True
                )
                self._thread.start()
            try:
                self._queue.put_nowait(event)
            except Full:
                self._leave_alone(f"it is {QUEUE_EVENTS:,} events behind")

    def end(self) -> None:
        """Says that nothing more comes; does not wait."""
        if self._thread is not None and not self._is_left_alone:
            try:
                self._queue.put_nowait(None)
            except Full:
                self._leave_alone(f"it is {QUEUE_EVENTS:,} events behind")

    def wait(self, deadline: float) -> None:
        """Waits for what is left until a time of `time.monotonic`, then goes on without it."""
        if self._thread is None or self._is_left_alone:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            self._leave_alone(self._failure)
        elif self._thread.is_alive():
            self._leave_alone("it did not take everything in time at the end")

    def _leave_alone(self, reason: str) -> None:
        self._is_left_alone = True
        self._warn(
            f"tracker {self.label} is left alone from here on: {reason} (the run goes on, and "
            "events.jsonl has everything)"
        )

    # On the thread of the tracker

    def _work(self) -> None:
        # The fifth boundary of style rule 32: the code called is not ours and may raise anything.
        try:
            self._feed()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - told by the thread of the events
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._failure = redact(f"{type(error).__name__}: {text}"[:500])

    def _feed(self) -> None:
        with closing(Ledger(self._folder / "trackers" / f"{self.label}.jsonl")) as ledger:
            tracker = self._make()
            run = TrackedRun(self._folder, _resolved_recipe(self._folder), ledger.id)
            ledger.name(tracker.start(run))
            for event in _missed(self._folder, ledger):
                _log(tracker, ledger, event)
            summary: Mapping[str, Json] | None = None
            while (event := self._queue.get()) is not None and not self._is_left_alone:
                if event.kind == "done":
                    summary = event.data
                _log(tracker, ledger, event)
            tracker.finish(summary)


def close_feeds(feeds: Sequence[Feed], *, is_finished: bool) -> None:
    """Ends all feeds; the time limit is for all together."""
    deadline = time.monotonic() + (FINISH_SECONDS if is_finished else STOP_SECONDS)
    for feed in feeds:
        feed.end()
    for feed in feeds:
        feed.wait(deadline)


def _log(tracker: Tracker, ledger: Ledger, event: Event) -> None:
    """Logs what the tracker does not have: steps after a crash or a rollback come a second time."""
    section = SECTIONS.get(event.kind)
    if section is None or ledger.has(event.kind, event.step):
        return
    found = figures_of(event, section)
    if found:
        tracker.log(event.step, found)
    ledger.note(event.kind, event.step)


def figures_of(event: Event, section: str) -> dict[str, float]:
    """The finite numbers of an event, under names such as train/loss."""
    return {
        f"{section}/{name}": float(value)
        for name, value in event.data.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _missed(folder: Path, ledger: Ledger) -> Iterator[Event]:
    """What earlier starts of the run have told that the tracker does not have."""
    for line in read_events(folder / "events.jsonl"):
        kind, step, at = line.pop("event"), line.pop("step"), line.pop("time")
        if kind in SECTIONS and not ledger.has(kind, step):
            yield Event(kind, step, at, line)


def _resolved_recipe(folder: Path) -> dict[str, Any]:
    text = (folder / "recipe.resolved.yaml").read_text(encoding="utf-8")
    return redact_tree(cast("dict[str, Any]", yaml.safe_load(text)))
