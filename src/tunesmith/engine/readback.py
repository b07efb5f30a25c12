"""Numbers of finished steps, read from the device one step late so that it never stands still."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Read = Callable[[], list[float]]


@dataclass(frozen=True)
class Arrival(Generic[T]):
    """Numbers that have arrived.

    `seconds` is the time from the start of their work, or from the arrival before if that was
    later: steps overlap on a device, and their times must add up.
    """

    about: T
    numbers: list[float]
    seconds: float


class Readback(Generic[T]):
    """A queue of small tensors on their way to the host, each with a note of what it is about.

    Args:
        start: begins to copy a tensor and returns what waits for the copy and reads it.
        lag: how many of them may be on their way while the device works on.
    """

    def __init__(self, start: Callable[[torch.Tensor], Read], lag: int) -> None:
        self._start = start
        self._lag = lag
        self._waiting: deque[tuple[T, float, Read]] = deque()
        self._seen = -math.inf

    def put(self, about: T, numbers: torch.Tensor, started: float) -> None:
        """Sends numbers on their way; does not wait.

        Args:
            about: comes back with them.
            numbers: one row, on the device.
            started: `time.perf_counter()` when their work began.
        """
        self._waiting.append((about, started, self._start(numbers)))

    def ready(self) -> Iterator[Arrival[T]]:
        """Takes out, oldest first, what is beyond the lag; waits for the device if it must."""
        while len(self._waiting) > self._lag:
            yield self._take()

    def drain(self) -> Iterator[Arrival[T]]:
        """Takes out everything."""
        while self._waiting:
            yield self._take()

    def _take(self) -> Arrival[T]:
        about, started, read = self._waiting.popleft()
        numbers = read()
        since, self._seen = max(started, self._seen), time.perf_counter()
        return Arrival(about, numbers, self._seen - since)


def open_readback(device: torch.device, _: type[T]) -> Readback[T]:
    """One step late on CUDA; at once elsewhere: a CPU has nothing to wait for."""
    if device.type == "cuda":
        return Readback[T](_start_cuda, lag=1)
    return Readback[T](_start_plain, lag=0)


def _start_plain(numbers: torch.Tensor) -> Read:
    return lambda: numbers.tolist()


def _start_cuda(numbers: torch.Tensor) -> Read:
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read
