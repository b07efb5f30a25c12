"""What a run came to, in a sentence and some figures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.evaluate.report.curves import best_of, points_of
from tunesmith.evaluate.report.evaluations import Evaluation, newest_with
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.shapes import number_of
from tunesmith.evaluate.report.wording import (
    clean,
    counted,
    duration,
    figure,
    metric_name,
    moment,
    p_value,
    percent,
    signed,
    size,
)
from tunesmith.evaluate.scores import Comparison


@dataclass(frozen=True)
class Verdict:
    """The sentence at the top of a report.

    Args:
        text: it.
        tone: `good`, `bad` or `open`.
        basis: what it rests on.
    """

    text: str
    tone: str
    basis: str


@dataclass(frozen=True)
class Tile:
    """A figure with its name."""

    value: str
    name: str


def verdict_of(run: RunRecord) -> Verdict:
    """From the newest evaluation; without one from the validations of the training."""
    evaluation = newest_with(run.evaluations)
    headline = evaluation.headline if evaluation else None
    if evaluation is not None and headline is not None and headline in evaluation.comparisons:
        return _of_comparison(evaluation, evaluation.comparisons[headline])
    if evaluation is not None and headline is not None:
        after = evaluation.model("after")
        if after is not None:
            return _of_score(evaluation, after.scores[headline].value, headline)
    return _of_validation(run)


def _of_comparison(evaluation: Evaluation, found: Comparison) -> Verdict:
    change, name = found.after - found.before, metric_name(found.metric)
    interval = f"95 % {signed(found.low)} to {signed(found.high)}, {p_value(found.p_value)}"
    ends = f"from {figure(found.before)} to {figure(found.after)} ({signed(change)}, {interval})"
    where = _rows_of(evaluation)
    basis = ", ".join(filter(None, (found.test, moment(evaluation.created))))
    if found.verdict == "no clear difference":
        text = f"No clear difference: {name} went {ends} {where}; more rows would tell."
        return Verdict(text, "open", basis)
    moved = "rose" if change > 0 else "fell"
    text = f"{_capital(name)} {moved} {ends} {where}."
    return Verdict(text, "good" if found.verdict == "better" else "bad", basis)


def _of_score(evaluation: Evaluation, value: float, name: str) -> Verdict:
    where = _rows_of(evaluation)
    text = f"{_capital(metric_name(name))} is {figure(value)} {where}; nothing was compared."
    return Verdict(text, "open", moment(evaluation.created))


def _rows_of(evaluation: Evaluation) -> str:
    """`on 100 held-out rows`, if the rows are the run's own; of other files nobody knows."""
    if evaluation.label.startswith("validation"):
        return f"on {counted(evaluation.num_rows, 'held-out row')}"
    return f"on {counted(evaluation.num_rows, 'row')} of {clean(evaluation.label)}"


def _of_validation(run: RunRecord) -> Verdict:
    name = next(
        (each for each in ("reward", "reward_accuracy", "accuracy") if _measured(run, each)), "loss"
    )
    measured = _measured(run, name)
    what = {"loss": "Validation loss", "reward": "Mean reward of held-out prompts"}.get(
        name, f"Validation {name.replace('_', ' ')}"
    )
    best = best_of(measured, name)
    if not measured or best is None:
        return _without_validation(run)
    (step, value), _ = best
    at = f"at step {step:,.0f}" + (f" of {run.num_steps:,}" if run.num_steps else "")
    held_out = HELD_OUT.search(str(run.start.get("overview")))
    at += f", on {held_out[1]} held-out rows" if held_out else ""
    basis = "no evaluation yet: `tunesmith evaluate` compares answers before and after"
    first_step, before = measured[0]
    if first_step != 0:
        return Verdict(f"{what} is {figure(value)} {at}.", "open", basis)
    change = value - before
    moved = "rose" if change > 0 else "fell" if change < 0 else "stayed"
    by = signed(change)
    if name == "loss" and before:
        by = f"{'+' if change > 0 else '−'}{percent(abs(change / before))}"
    is_better = change < 0 if name == "loss" else change > 0
    text = f"{what} {moved} from {figure(before)} to {figure(value)} ({by}) {at}."
    return Verdict(text, "good" if is_better else "bad", basis)


HELD_OUT = re.compile(r"([\d,]+) to validate on")


def _measured(run: RunRecord, name: str) -> tuple[tuple[float, float], ...]:
    return points_of(run.of_kind("evaluation"), name)


def _without_validation(run: RunRecord) -> Verdict:
    losses = points_of(run.of_kind("step"), "loss")
    if not losses:
        return Verdict("No step was trained.", "bad", "there are no events of steps")
    (_, first), (step, last) = losses[0], losses[-1]
    text = f"Training loss went from {figure(first)} to {figure(last)} in {step:,.0f} steps."
    return Verdict(text, "open", "nothing was held out: this does not show that it got better")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def tiles_of(run: RunRecord) -> list[Tile]:
    """The figures of a run that people ask for first."""
    steps = f"{run.last_step:,}" + (f" of {run.num_steps:,}" if run.num_steps else "")
    epochs = run.figure("epochs")
    seconds = run.figure("runtime_seconds") or trained_seconds(run)
    predicted, peak = run.figure("predicted_peak_of_steps_bytes"), run.figure("peak_memory_bytes")
    predicted = predicted or run.start.get("predicted_peak_bytes")
    found = [
        Tile(
            method_of(run, has_objective=False), str(run.recipe.get("objective.name") or "method")
        ),
        Tile(steps, f"steps, {figure(epochs)} epochs" if epochs else "steps"),
        Tile(duration(seconds), "of training"),
        Tile(figure(speed(run)), "tokens per second"),
    ]
    if run.figure("best_step") is not None:
        found.append(Tile(f"{run.figure('best_step'):,.0f}", "best step, kept in model/"))
    if run.figure("trained_parameters"):
        found.append(Tile(short_count(run.figure("trained_parameters") or 0), "trained parameters"))
    if peak:
        name = f"peak memory, {size(predicted)} predicted" if predicted else "peak memory"
        found.append(Tile(size(peak), name))
    return found


def speed(run: RunRecord) -> float | None:
    """Tokens per second, of the whole run or of the steps so far."""
    return run.figure("tokens_per_second") or _mean(
        [y for _, y in points_of(run.of_kind("step"), "tokens_per_second")]
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def trained_seconds(run: RunRecord) -> float | None:
    """Of an unfinished run: the time of its steps, pauses left out."""
    parts = [
        tokens / rate
        for step in run.of_kind("step")
        if (rate := number_of(step.get("tokens_per_second")))
        and (tokens := number_of(step.get("tokens")))
    ]
    return sum(parts) if parts else None


def short_count(value: float) -> str:
    """`4.88 M`."""
    for unit, power in ((" G", 9), (" M", 6), (" k", 3)):
        if value >= 10**power:
            return f"{figure(value / 10**power)}{unit}"
    return f"{value:.0f}"


def method_of(run: RunRecord, *, has_objective: bool = True) -> str:
    """`lora r16 · sft`."""
    method = str(run.recipe.get("method.name") or "–")
    rank = run.recipe.get("method.rank")
    objective = run.recipe.get("objective.name") if has_objective else None
    return method + (f" r{rank}" if rank else "") + (f" · {objective}" if objective else "")
