"""Work that is done at once, for when no thread can be started."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class InlineExecutor(Executor):
    """Does what it is given before `submit` returns; the future has the result or the error."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Calls the function."""
        done: Future[T] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor's thread does; `result` raises it
            done.set_exception(error)
        return done


def submit_or_do(pool: Executor, work: Callable[[], T]) -> tuple[Executor, Future[T]]:
    """Gives work to a pool, or does it at once if memory does not suffice for the pool's thread.

    Returns:
        the pool to go on with, and the future.
    """
    try:
        return pool, pool.submit(work)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        # What was queued when its thread did not start must not run later.
        pool.shutdown(wait=False, cancel_futures=True)
        inline = InlineExecutor()
        return inline, inline.submit(work)
