"""The row of the fault matrix about trackers: fails, never comes back, or is told of too late."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine.runs import final_bytes, run_to_end
from tunesmith.engine.trackers import feed


class DownTracker(ModuleType):
    """Stands in for the library `trackio`; one of its calls fails or hangs."""

    def __init__(self, place: str, fault: Callable[[], None]) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.place, self.fault = place, fault

    def _pass(self, place: str) -> None:
        if place == self.place:
            self.fault()

    def init(self, **_: Any) -> Any:
        self._pass("init")
        return SimpleNamespace(
            name="run", log=lambda *_, **__: self._pass("log"), finish=lambda: self._pass("finish")
        )


def no_network() -> None:
    raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("place", "fault"), [("init", "fails"), ("log", "fails"), ("finish", "fails"), ("log", "hangs")]
)
def test_row_46_a_tracker_that_is_down(
    place: str,
    fault: str,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    act: Callable[[], None] = no_network if fault == "fails" else lambda: release.wait(30) and None
    monkeypatch.setitem(sys.modules, "trackio", DownTracker(place, act))
    monkeypatch.setattr(feed, "FINISH_SECONDS", 0.5)
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    run_to_end(tiny_recipe(), plain)
    run_to_end(tiny_recipe(log={"trackers": ["trackio"]}), tracked)
    release.set()
    lines = (tracked / "events.jsonl").read_text(encoding="utf-8").splitlines()
    warnings = [event for event in map(json.loads, lines) if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "tracker trackio is left alone" in warnings[0]["message"]
    assert final_bytes(tracked) == final_bytes(plain)
