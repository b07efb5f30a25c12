"""How often and how far apart something is asked again."""

from __future__ import annotations

import time

import pytest

from tunesmith.io import retry
from tunesmith.io.retry import ATTEMPTS, MAX_RETRY_SECONDS, NoAnswerError, retried


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited; nothing is."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


class Flaky:
    """Fails so often, each time after some bytes have come."""

    def __init__(self, failures: int, *, num_bytes: int = 0, **error: object) -> None:
        self.failures = failures
        self.piece = num_bytes
        self.error = {"may_pass": True, **error}
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise NoAnswerError(f"failure {self.calls}", **self.error) from OSError("reset")  # type: ignore[arg-type]
        return "answer"

    def num_bytes(self) -> int:
        return self.calls * self.piece


def test_passing_failures(pauses: list[float]) -> None:
    assert retried(Flaky(3)) == "answer"
    assert pauses == [1.0, 2.0, 4.0]


def test_the_last_failure_is_told_with_its_cause(pauses: list[float]) -> None:
    with pytest.raises(NoAnswerError, match=rf"failure {ATTEMPTS} \(the last of") as raised:
        retried(Flaky(100, status=503))
    assert len(pauses) == ATTEMPTS - 1
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.status == 503


def test_what_does_not_pass_is_not_asked_again(pauses: list[float]) -> None:
    action = Flaky(1, may_pass=False)
    with pytest.raises(NoAnswerError, match=r"failure 1$"):
        retried(action)
    assert (action.calls, pauses) == (1, [])


@pytest.mark.parametrize(("asked", "waited"), [(0.5, 1.0), (7.0, 7.0), (3600.0, MAX_RETRY_SECONDS)])
def test_what_the_hub_asks_to_wait(asked: float, waited: float, pauses: list[float]) -> None:
    assert retried(Flaky(1, wait_seconds=asked)) == "answer"
    assert pauses == [waited]


@pytest.mark.parametrize("enough", [True, False])
def test_progress_is_no_failure(enough: bool, pauses: list[float]) -> None:
    action = Flaky(3 * ATTEMPTS, num_bytes=retry.PROGRESS_BYTES - (not enough))
    if enough:
        assert retried(action, action.num_bytes) == "answer"
        assert set(pauses) == {1.0}
    else:
        with pytest.raises(NoAnswerError):
            retried(action, action.num_bytes)
