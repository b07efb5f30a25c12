"""Asking a hub again: what fails in passing gets some attempts more, ever further apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 5
"""In a row, without PROGRESS_BYTES more of a file in one of them."""
PROGRESS_BYTES = 1 << 20
RETRY_SECONDS = 1.0
"""Before the second attempt; before each further one twice as long."""
MAX_RETRY_SECONDS = 30.0
"""Also where a server asks for more (`Retry-After`)."""


class NoAnswerError(Exception):
    """The hub did not send what was asked for.

    Args:
        reason: what it sent instead, or what the network said.
        may_pass: whether the same question may be answered later.
        status: of an HTTP answer, None if there was none.
        wait_seconds: how long the hub asks to wait.
    """

    def __init__(
        self,
        reason: str,
        *,
        may_pass: bool,
        status: int | None = None,
        wait_seconds: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.may_pass = may_pass
        self.status = status
        self.wait_seconds = wait_seconds


def retried(action: Callable[[], T], num_bytes: Callable[[], int] = lambda: 0) -> T:
    """Does it again while it fails in a way that may pass, and says at last how often.

    Args:
        action: raises NoAnswerError.
        num_bytes: how much has come so far. An attempt that brought PROGRESS_BYTES is no failure: a
            bad line gets a large file through, too.

    Raises:
        NoAnswerError: the last one, with the cause that it had.
    """
    failures = 0
    while True:
        before = num_bytes()
        try:
            return action()
        except NoAnswerError as error:
            if not error.may_pass:
                raise
            failures = 1 if num_bytes() - before >= PROGRESS_BYTES else failures + 1
            if failures >= ATTEMPTS:
                reason = f"{error} (the last of {ATTEMPTS} attempts)"
                cause = error.__cause__ or error
                raise NoAnswerError(reason, may_pass=True, status=error.status) from cause
            pause = max(RETRY_SECONDS * 2 ** (failures - 1), error.wait_seconds or 0.0)
            time.sleep(min(pause, MAX_RETRY_SECONDS))
