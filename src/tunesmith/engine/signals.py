"""Signals: the first asks a run to save and stop, a second one stops it at once.

SIGINT, SIGTERM and SIGHUP stop, SIGUSR1 saves and goes on. While training, the loop looks between
two micro-batches; in all other phases the run ends where the signal finds it, because what they
leave on disk is whole or absent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tunesmith.errors import Interrupted

ONE_SIGNAL_SECONDS = 0.5
"""Shells, systemd and Slurm signal every process, and a supervisor passes it on: one signal."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """While entered, turns stop signals into `Interrupted`.

    Args:
        where: the run directory, for the message.
    """

    def __init__(self, where: str = "run") -> None:
        self.where = where
        self.received: int | None = None
        self.wants_save = False
        self._since = 0.0
        self._is_deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python sets handlers in the main thread alone; elsewhere the owner of the thread decides.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # nohup ignores SIGHUP: a run that outlives its terminal must go on doing so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask_save)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Generator[None]:
        """Inside the block a signal is remembered only: who looks at `received` acts on it."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since < ONE_SIGNAL_SECONDS:
                return
            # The user insists: no clean-up. Saves are atomic, so nothing half-written is visible.
            os._exit(128 + number)
        self.received, self._since = number, time.monotonic()
        if not self._is_deferred:
            raise Interrupted(number, self.where, step=None)

    def _ask_save(self, number: int, frame: FrameType | None) -> None:
        self.wants_save = True
