"""What a run tells: its events, and the progress of work that is no training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from tunesmith.types.json import Json

T = TypeVar("T")


EventKind = Literal[
    "start", "resume", "step", "evaluation", "checkpoint", "skip", "rollback", "warning", "done"
]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run; `events.jsonl` holds one a line."""

    kind: EventKind
    step: int
    time: float
    data: Mapping[str, Json] = field(default_factory=dict[str, Json])


class Listener(Protocol):
    """Anything that follows the event stream: the console, plots, trackers."""

    def __call__(self, event: Event) -> None:
        """Takes one event, in order."""
        ...


class Reporter(Protocol):
    """Shows a person what long work is going on; silent by default."""

    def note(self, text: str) -> None:
        """Says one line."""
        ...

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes the items on, showing how many went by."""
        ...

    def measure(
        self, label: str, items: Iterable[T], total: int, position: Callable[[], int]
    ) -> Iterator[T]:
        """Passes the items on, showing how many of `total` bytes `position` has reached."""
        ...

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Shows that something without a countable length goes on."""
        ...


class SilentReporter:
    """The Reporter for programs: says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes the items on."""
        return iter(items)

    def measure(
        self, label: str, items: Iterable[T], total: int, position: Callable[[], int]
    ) -> Iterator[T]:
        """Passes the items on."""
        return iter(items)

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Shows nothing."""
        return nullcontext()
