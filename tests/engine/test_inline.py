"""Work goes on in the caller's thread when no other can be started."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from tunesmith.engine.inline import InlineExecutor, submit_or_do
from tunesmith.engine.prefetch import Placed, Prefetch


class NoThreads(Executor):
    """A pool whose thread does not start."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.was_shut_down = False

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        raise RuntimeError("can't start new thread")

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        self.was_shut_down = True


def fail() -> int:
    raise OSError("the disk is gone")


def test_results_and_errors_are_there_at_once() -> None:
    pool = InlineExecutor()
    assert pool.submit(len, "abc").result() == 3
    with pytest.raises(OSError, match="gone"):
        pool.submit(fail).result()


def test_a_pool_that_works_is_kept() -> None:
    with ThreadPoolExecutor(1) as pool:
        kept, future = submit_or_do(pool, lambda: 7)
        assert kept is pool
        assert future.result() == 7
    with pytest.raises(RuntimeError, match="shutdown"):
        submit_or_do(pool, lambda: 7)


def test_without_threads_work_is_done_here() -> None:
    pool = NoThreads()
    other, future = submit_or_do(pool, lambda: 7)
    assert future.result() == 7
    assert pool.was_shut_down
    assert isinstance(other, InlineExecutor)


def test_batches_come_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.engine.prefetch.ThreadPoolExecutor", NoThreads)
    with Prefetch(iter([1, 2, 3]), Placed) as items:
        assert list(items) == [1, 2, 3]
