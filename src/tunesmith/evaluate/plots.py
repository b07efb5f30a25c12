"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.io.atomic import write_atomic

PANELS = {
    "reward": ("reward", "answer_tokens"),
    "reward_accuracy": ("reward_accuracy", "loss"),
    "accuracy": ("accuracy", "loss"),
}
"""What is drawn of a run that has such a figure. The loss of policies says nothing: advantages have
the mean 0."""

LABELS = {
    "reward": "mean reward",
    "reward_accuracy": "accuracy of rewards",
    "answer_tokens": "tokens of an answer",
}


def plot_loss(events: list[dict[str, Any]], file: Path, title: str) -> None:
    """Draws training and validation loss over the steps into a PNG file.

    Accuracies, where a run has them, stand in a panel above; rewards take the place of the loss.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = next((n for n in PANELS if any(n in event for event in events)), "loss")
    names = PANELS.get(measure, ("loss",))
    figure = Figure(figsize=(8, 1.5 + 3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(all_axes, names, strict=True):
        _draw(axes, events, name, has_best=name in (measure, "loss"))
    all_axes[0].set_title(title)
    all_axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(file, buffer.getvalue())


def _draw(axes: Any, events: list[dict[str, Any]], name: str, *, has_best: bool) -> None:
    """One panel: a figure of training steps, and of validations."""
    known = [event for event in events if event.get(name) is not None]  # null: not finite
    steps = [event for event in known if event["event"] == "step"]
    measured = [event for event in known if event["event"] == "evaluation"]
    x, y = [e["step"] for e in steps], [e[name] for e in steps]
    smooth = _smooth(y, weight=0.9 if len(y) > 50 else 0.6)
    axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(x, smooth, color="tab:blue", linewidth=2, label="train (smoothed)")
    if measured:
        at, values = [e["step"] for e in measured], [e[name] for e in measured]
        axes.plot(at, values, color="tab:orange", marker="o", label="validation")
        _mark_best(axes, [e for e in measured if e["step"] and has_best], name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(LABELS.get(name, name))
    axes.margins(y=0.12)  # room for a word above the best point
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
        xytext=(0, 8),
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
