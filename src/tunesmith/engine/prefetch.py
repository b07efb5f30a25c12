"""Data that never waits: the next batches are prepared in a background thread.

One thread alone takes them from their source, so the order is the source's, and a pure loader makes
it the same at every start. On CUDA batches are pinned and copied on a stream of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch

from tunesmith.engine.inline import submit_or_do
from tunesmith.types import GlobalBatch, PackedBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Placed(Generic[T]):
    """An item on its device, with the tensors that are still being copied there, if any."""

    item: T
    copying: tuple[torch.Tensor, ...] = ()
    copied: torch.cuda.Event | None = None


class Prefetch(Generic[T]):
    """Iterates over items that a thread has made ready; use it in a `with` statement.

    What the source raises comes out of `next` with its traceback, at the item's turn. Leaving the
    `with` block, for whatever reason, waits for the item that is just being made, and no other.

    Args:
        items: the source; only the thread iterates it.
        place: brings an item to the device.
        depth: how many items are ready at most, besides the one in use.
    """

    def __init__(
        self, items: Iterable[T], place: Callable[[T], Placed[T]], *, depth: int = 2
    ) -> None:
        self._items = iter(items)
        self._place = place
        self._depth = depth
        self._pool: Executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ready: deque[Future[Placed[T] | None]] = deque()

    def __enter__(self) -> Prefetch[T]:
        for _ in range(self._depth):
            self._order()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        placed = self._ready.popleft().result()
        self._order()
        if placed is None:
            raise StopIteration
        if placed.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(placed.copied)
            for tensor in placed.copying:
                # Its memory is the side stream's: not to be reused before this one is done.
                tensor.record_stream(stream)
        return placed.item

    def _order(self) -> None:
        self._pool, ready = submit_or_do(self._pool, self._make)
        self._ready.append(ready)

    def _make(self) -> Placed[T] | None:
        for item in self._items:
            return self._place(item)
        return None


def prefetch_steps(
    batch: Callable[[int], GlobalBatch], steps: Iterable[int], device: torch.device
) -> Prefetch[GlobalBatch]:
    """The global batches of some steps, on the device."""
    return Prefetch((batch(step) for step in steps), placer(device))


def prefetch_validation(
    batches: Iterable[PackedBatch], device: torch.device
) -> Prefetch[tuple[PackedBatch, float]]:
    """Validation batches on the device, each with what its loss counts for."""
    weighed = ((batch, batch.loss_weight) for batch in batches)
    return Prefetch(weighed, placer(device))


def placer(device: torch.device) -> Callable[[Any], Placed[Any]]:
    """What brings a batch to a device: pinned and on a side stream for CUDA, else as it is."""
    if device.type != "cuda":
        return Placed
    side = torch.cuda.Stream(device)

    def place(item: Any) -> Placed[Any]:
        with torch.cuda.stream(side):
            pinned = map_tensors(item, lambda tensor: tensor.pin_memory())
            moved = map_tensors(pinned, lambda tensor: tensor.to(device, non_blocking=True))
            copying: list[torch.Tensor] = []
            map_tensors(moved, lambda tensor: copying.append(tensor) or tensor)
            copied = torch.cuda.Event()
            copied.record(side)
            return Placed(moved, tuple(copying), copied)

    return place


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same tuples, dictionaries and dataclasses with every tensor in them changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        return {name: map_tensors(item, change) for name, item in named.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(item, change) for item in cast("tuple[Any, ...]", value))
    if not isinstance(value, GlobalBatch | PackedBatch):
        return value
    old = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: map_tensors(item, change) for name, item in old.items()})
