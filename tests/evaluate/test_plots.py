"""Plots: the figures that tell where a run stands, as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from tunesmith.evaluate.plots import plot_loss


def events_with(**figures: float) -> list[dict[str, Any]]:
    steps = [{"event": "step", "step": n, "loss": 2.0 - n / 10, **figures} for n in range(1, 9)]
    measured = [{"event": "evaluation", "step": n, "loss": 1.5, **figures} for n in (0, 4, 8)]
    broken = {"event": "step", "step": 9, "loss": None}
    return [{"event": "start", "step": 0}, *steps, *measured, broken]


@pytest.mark.parametrize(
    ("figures", "labels"),
    [
        ({}, ["loss"]),
        ({"reward_accuracy": 0.7}, ["accuracy of rewards", "loss"]),
        ({"accuracy": 0.7, "macro_f1": 0.6}, ["accuracy", "loss"]),
        ({"reward": 0.7, "answer_tokens": 9.0}, ["mean reward", "tokens of an answer"]),
    ],
)
def test_panels(
    figures: dict[str, float], labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda self, text: drawn.append(text))
    plot_loss(events_with(**figures), tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == labels


def test_a_run_without_steps_has_a_plot(tmp_path: Path) -> None:
    plot_loss([{"event": "start", "step": 0}], tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").exists()
