"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.io.atomic import write_atomic

MEASURES = ("reward", "reward_accuracy", "accuracy")
"""What a run is looked at by, if it has it, above its loss: higher is better."""


def plot_loss(events: list[dict[str, Any]], file: Path, title: str) -> None:
    """Draws training and validation loss over the steps into a PNG file.

    Rewards or accuracies, where a run has them, stand in a panel above. A loss of policies is only
    that of training: their validation is the reward.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = next((n for n in MEASURES if any(n in event for event in events)), None)
    names = [measure, "loss"] if measure else ["loss"]
    figure = Figure(figsize=(8, 1.5 + 3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(all_axes, names, strict=True):
        is_negative_reward = name == "loss" and measure == "reward"
        _draw(axes, events, name, is_measured=not is_negative_reward)
    all_axes[0].set_title(title)
    all_axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(file, buffer.getvalue())


LABELS = {"loss": "loss", "reward": "mean reward", "reward_accuracy": "accuracy of rewards"}


def _draw(axes: Any, events: list[dict[str, Any]], name: str, *, is_measured: bool) -> None:
    """One panel: a figure of training steps, and of validations."""
    known = [event for event in events if event.get(name) is not None]  # null: not finite
    steps = [event for event in known if event["event"] == "step"]
    measured = [event for event in known if event["event"] == "evaluation" and is_measured]
    x, y = [e["step"] for e in steps], [e[name] for e in steps]
    smooth = _smooth(y, weight=0.9 if len(y) > 50 else 0.6)
    axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(x, smooth, color="tab:blue", linewidth=2, label="train (smoothed)")
    if measured:
        at, values = [e["step"] for e in measured], [e[name] for e in measured]
        axes.plot(at, values, color="tab:orange", marker="o", label="validation")
        _mark_best(axes, [e for e in measured if e["step"]], name)
    axes.set_ylabel(LABELS.get(name, name))
    axes.grid(alpha=0.3)
    axes.legend()


def _mark_best(axes: Any, measured: list[dict[str, Any]], name: str) -> None:
    if not measured:
        return
    choose = min if name == "loss" else max
    best = choose(measured, key=lambda event: event[name])
    axes.annotate(
        f"best {best[name]:.3f}",
        (best["step"], best[name]),
        textcoords="offset points",
        xytext=(0, 10),
        ha="center",
    )


def _smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed: list[float] = []
    total, norm = 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
