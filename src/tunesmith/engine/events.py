"""The event stream of a run: appended to `events.jsonl`, handed to listeners."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.io.atomic import disk_error
from tunesmith.io.fault import fault
from tunesmith.io.redact import redact_tree
from tunesmith.types import Event, EventKind, Json, Listener


class EventLog:
    """Writes events, one JSON object a line, and passes them on."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        if is_torn:  # killed in the middle of a line: the next one starts on its own
            self._file.write("\n")
        self._listeners = tuple(listeners)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written has been told
            self._file.close()

    def emit(self, kind: EventKind, step: int, data: Mapping[str, Json] | None = None) -> None:
        """Writes one event and tells the listeners.

        Raises:
            DiskError: it cannot be written (`disk.write`).
        """
        event = Event(kind, step, time.time(), redact_tree(data or {}))
        line: dict[str, Json] = {"event": kind, "step": step, "time": round(event.time, 3)}
        try:
            fault("log.emit", step=step)
            text = json.dumps({**line, **_finite(event.data)}, ensure_ascii=False, allow_nan=False)
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(self._path, error) from error
        for listener in self._listeners:
            try:
                listener(event)
            except OSError as error:  # a terminal that went away must not end a run
                self._listeners = tuple(each for each in self._listeners if each is not listener)
                message = f"a listener was dropped: {error}"
                self.emit("warning", step, {"message": message})


def _finite(data: Mapping[str, Json]) -> dict[str, Json]:
    """NaN and infinity are no JSON: they are written as null."""
    is_odd = {key: isinstance(v, float) and not math.isfinite(v) for key, v in data.items()}
    return {key: None if is_odd[key] else value for key, value in data.items()}


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events that count, in step order.

    After a crash, steps past the last checkpoint run again and log again: of several events of one
    kind for one step the last counts, of warnings that say the same the last. A torn last line
    (the process was killed in it) is skipped.
    """
    latest: dict[tuple[int, str, str], dict[str, Any]] = {}
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            latest[event["step"], event["event"], event.get("message", "")] = event
    yield from (latest[key] for key in sorted(latest, key=lambda key: key[0]))
