"""Plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.io.atomic import write_atomic


def plot_loss(events: list[dict[str, Any]], file: Path, title: str) -> None:
    """Draws training and validation loss over the steps into a PNG file."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [event for event in events if event.get("loss") is not None]  # null: not finite
    steps = [event for event in known if event["event"] == "step"]
    measured = [event for event in known if event["event"] == "evaluation"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = [e["step"] for e in steps], [e["loss"] for e in steps]
    smooth = _smooth(y, weight=0.9 if len(y) > 50 else 0.6)
    axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(x, smooth, color="tab:blue", linewidth=2, label="train (smoothed)")
    if measured:
        axes.plot(
            [e["step"] for e in measured],
            [e["loss"] for e in measured],
            color="tab:orange",
            marker="o",
            label="validation",
        )
        best = min((e for e in measured if e["step"]), key=lambda e: e["loss"], default=None)
        if best is not None:
            axes.annotate(
                f"best {best['loss']:.3f}",
                (best["step"], best["loss"]),
                textcoords="offset points",
                xytext=(0, 10),
                ha="center",
            )
    axes.set(xlabel="step", ylabel="loss per supervised token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(file, buffer.getvalue())


def _smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed: list[float] = []
    total, norm = 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
