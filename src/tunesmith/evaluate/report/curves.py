"""Which curves a run has: its measure first, then rate, gradient, speed, and what else it logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.evaluate.report.charts import Chart, Drawing, Mark, Point, Series, draw, smoothed
from tunesmith.evaluate.report.reading import Events, RunRecord
from tunesmith.evaluate.report.shapes import number_of
from tunesmith.evaluate.report.wording import figure

TITLES = {
    "loss": "Loss",
    "reward": "Mean reward",
    "reward_accuracy": "Accuracy of rewards",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "general_loss": "Forgetting: loss on general text",
    "general_kl": "Forgetting: KL from the base model",
    "answer_tokens": "Tokens of an answer",
}
MAIN = ("reward", "reward_accuracy", "accuracy", "macro_f1", "loss")
"""What a run is about, the first it has in front. The loss of policies says nothing."""

SMALL = ("learning_rate", "grad_norm", "tokens_per_second")
FORGETTING = ("general_loss", "general_kl")
NO_CURVE = {
    *("event", "step", "time", "epoch", "tokens", "supervised_tokens", "seconds", "best"),
    *MAIN,
    *SMALL,
    *FORGETTING,
}
LOWER_IS_BETTER = {"loss", *FORGETTING}


@dataclass(frozen=True)
class Curves:
    """The charts of a run: large ones, small ones, and those behind a fold."""

    large: tuple[Drawing, ...]
    small: tuple[Drawing, ...]
    more: tuple[Drawing, ...]
    mark_kinds: tuple[str, ...]


def curves_of(run: RunRecord) -> Curves:
    """All curves that the events of a run have."""
    marks = marks_of(run)
    names = [name for name in MAIN if _has(run, name)]
    if "reward" in names:
        names.remove("loss")
    others = sorted(
        {
            key
            for event in (*run.of_kind("step"), *run.of_kind("evaluation"))
            for key, value in event.items()
            if key not in NO_CURVE and number_of(value) is not None
        }
    )
    forgetting = [name for name in FORGETTING if _has(run, name)]
    kinds = tuple(dict.fromkeys(mark.kind for mark in marks))
    return Curves(
        large=_drawn(run, [*names, *forgetting], marks),
        small=_drawn(run, [name for name in SMALL if _has(run, name)], ()),
        more=_drawn(run, others, ()),
        mark_kinds=kinds,
    )


def _has(run: RunRecord, name: str) -> bool:
    return any(
        number_of(event.get(name)) is not None
        for kind in ("step", "evaluation")
        for event in run.of_kind(kind)
    )


def _drawn(run: RunRecord, names: Sequence[str], marks: Sequence[Mark]) -> tuple[Drawing, ...]:
    # What happened is marked in the first chart alone.
    charts = (chart_of(run, name, () if index else marks) for index, name in enumerate(names))
    drawings = map(draw, charts)
    return tuple(drawing for drawing in drawings if drawing is not None)


def points_of(events: Events, name: str) -> tuple[Point, ...]:
    """A figure of events over their steps; what is not finite is left out."""
    known = ((event["step"], number_of(event.get(name))) for event in events)
    return tuple((float(step), value) for step, value in known if value is not None)


def chart_of(run: RunRecord, name: str, marks: Sequence[Mark]) -> Chart:
    """The chart of one figure."""
    steps = points_of(run.of_kind("step"), name)
    measured = points_of(run.of_kind("evaluation"), name)
    is_main = name in MAIN
    series: list[Series] = []
    if steps and name not in ("learning_rate", "tokens_per_second"):
        series.append(Series("", steps, 1, "faint"))
        series.append(Series("training, smoothed", smoothed(steps), 1))
    elif steps:
        series.append(Series("training", steps, 1))
    if measured:
        series.append(Series("validation", measured, 2, "dots"))
    best = best_of(measured, name) if is_main else None
    return Chart(
        title=TITLES.get(name, name.replace("_", " ").capitalize()),
        series=tuple(series),
        marks=tuple(marks),
        best=best,
        about=_about(steps, measured, best),
    )


def best_of(measured: Sequence[Point], name: str) -> tuple[Point, str] | None:
    """The best validation after the start, with what is written beside it."""
    trained = [point for point in measured if point[0] > 0]
    if not trained:
        return None
    choose = min if name in LOWER_IS_BETTER else max
    best = choose(trained, key=lambda point: point[1])
    return best, f"best {figure(best[1])}"


def _about(
    steps: Sequence[Point], measured: Sequence[Point], best: tuple[Point, str] | None
) -> str:
    parts: list[str] = []
    for name, points in (("training", steps), ("validation", measured)):
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(
                f"{name} from {figure(start)} at step {first:.0f} to {figure(end)} at {last:.0f}"
            )
    if best is not None:
        parts.append(f"{best[1]} at step {best[0][0]:.0f}")
    return "; ".join(parts)


def marks_of(run: RunRecord) -> tuple[Mark, ...]:
    """What happened to the run, by step."""
    return tuple(
        Mark(float(event["step"]), kind)
        for kind in ("rollback", "resume", "skip", "checkpoint")
        for event in run.of_kind(kind)
    )
