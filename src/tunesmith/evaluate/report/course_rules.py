"""Rules of the diagnosis about the course of a training: losses, gradients, memory, speed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median

from tunesmith.evaluate.report.curves import points_of
from tunesmith.evaluate.report.finding import Finding
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.shapes import number_of, texts_in
from tunesmith.evaluate.report.wording import (
    counted,
    figure,
    percent,
)


def unfinished(run: RunRecord) -> Finding | None:
    """It has no end: stopped, killed, or still running."""
    if run.is_finished:
        return None
    of_all = f" of {run.num_steps:,}" if run.num_steps else ""
    saved = [event["step"] for event in run.of_kind("checkpoint")]
    where = f"the newest checkpoint is of step {saved[-1]:,}" if saved else "nothing is saved yet"
    return Finding(
        "unfinished",
        "warn",
        "The run has not come to its end",
        f"the last step that was logged is {run.last_step:,}{of_all}; {where}",
        "the same `tunesmith train` goes on from the newest checkpoint",
    )


DIVERGED_SHARE = 1.3
"""The last losses over the lowest of the run, both smoothed: above this it has left its course."""


def diverged(run: RunRecord) -> Finding | None:
    """The training loss ends far above where it was, or is no number."""
    steps = run.of_kind("step")
    bad = [event["step"] for event in steps if event.get("loss", 0) is None]
    if "reward" in (steps[-1] if steps else {}) and not bad:
        return None
    windows = window_means([y for _, y in points_of(steps, "loss")])
    if len(bad) > 2:
        evidence = f"the loss is not finite in {counted(len(bad), 'step')}, first in step {bad[0]}"
    elif (
        len(windows) >= 4
        and windows[-1] > DIVERGED_SHARE * min(windows) > 0
        and (windows[-1] > windows[0])
    ):
        low, end, start = (figure(each) for each in (min(windows), windows[-1], windows[0]))
        evidence = f"the training loss began at {start}, fell to {low} and ended at {end}"
    else:
        return None
    advice = f"{lower_rate(run, 5)}, a longer train.warmup"
    return Finding("diverged", "bad", "Training diverged", evidence, advice)


def window_means(values: Sequence[float], parts: int = 10) -> list[float]:
    """Means of so many equal stretches of a curve, of fewer if it is short."""
    parts = min(parts, len(values) // 2)
    if parts < 1:
        return []
    return [
        fmean(values[len(values) * part // parts : len(values) * (part + 1) // parts])
        for part in range(parts)
    ]


SPIKE = 8.0
"""A gradient norm over the median of the run's: a spike."""

MANY_SPIKES = 0.02


def rate_too_high(run: RunRecord) -> Finding | None:
    """Steps were skipped or rolled back, or gradients leap."""
    skips, rollbacks = run.of_kind("skip"), run.of_kind("rollback")
    norms = [y for _, y in points_of(run.of_kind("step"), "grad_norm")]
    middle = median(norms) if norms else 0.0
    spikes = [norm for norm in norms if middle and norm > SPIKE * middle]
    evidence: list[str] = []
    if skips:
        evidence.append(
            f"{counted(len(skips), 'step')} not learned from (first {skips[0]['step']})"
        )
    if rollbacks:
        evidence.append(counted(len(rollbacks), "rollback"))
    if len(spikes) > max(2.0, MANY_SPIKES * len(norms)):
        highest = figure(max(spikes))
        evidence.append(
            f"{len(spikes)} of {counted(len(norms), 'gradient norm')} over {SPIKE:.0f} times the "
            f"median of {figure(middle)}, up to {highest}"
        )
    if not evidence:
        return None
    samples = texts_in(skips[0].get("samples"))[:2] if skips else []
    look = f"; or look at the samples of the first skipped step: {', '.join(samples)}"
    return Finding(
        "rate-too-high",
        "bad" if rollbacks else "warn",
        "The learning rate may be too high, or some samples are broken",
        "; ".join(evidence),
        lower_rate(run, 3) + (look if samples else ""),
    )


def lower_rate(run: RunRecord, factor: float) -> str:
    """An override with a smaller learning rate."""
    rate = number_of(run.recipe.get("train.learning_rate"))
    return f"`train.learning_rate={rate / factor:.2g}`" if rate else "a lower train.learning_rate"


def no_validation(run: RunRecord) -> Finding | None:
    """Nothing was measured on rows that were not trained on."""
    has_any = any(points_of(run.of_kind("evaluation"), name) for name in ("loss", "reward"))
    if has_any or not run.of_kind("step"):
        return None
    return Finding(
        "no-validation",
        "warn",
        "Nothing was held out",
        "there is no validation loss: over-training cannot be seen, and the last weights are kept, "
        "not the best",
        "`data.validation=0.1`",
    )


RISE = 0.02
"""Of the validation loss over its best, before it counts as a rise."""


def over_trained(run: RunRecord) -> Finding | None:
    """Validation got worse while training went on falling."""
    measured = [p for p in points_of(run.of_kind("evaluation"), "loss") if p[0] > 0]
    windows = window_means([y for _, y in points_of(run.of_kind("step"), "loss")])
    if run.measure == "reward" or len(measured) < 2 or len(windows) < 2:
        return None
    best_step, best = min(measured, key=lambda point: point[1])
    last_step, last = measured[-1]
    if last <= best + RISE * abs(best) or windows[-1] > windows[0]:
        return None
    epochs = number_of(run.result.get("epochs")) or number_of(run.recipe.get("train.epochs")) or 0
    fewer = epochs * best_step / max(last_step, 1)
    advice = "`evaluate.early_stopping=2` stops in time"
    advice += f"; about {fewer:.1f} epochs instead of {epochs:.1f}" if epochs else ""
    return Finding(
        "over-trained",
        "warn",
        "Trained longer than was good",
        f"validation was best at step {best_step:,.0f} ({figure(best)}) and rose to {figure(last)} "
        f"while the training loss fell to {figure(windows[-1])}; the best weights are kept",
        f"{advice}; more rows help most",
    )


STILL_FALLING = 0.05
"""Of all that was gained, gained since the evaluation before the last: there is more to gain."""


def under_trained(run: RunRecord) -> Finding | None:
    """Validation was still getting better at the end."""
    name = run.measure
    measured = points_of(run.of_kind("evaluation"), name)
    if not run.is_finished or len(measured) < 3:
        return None
    values = [-y if name == "reward" else y for _, y in measured]
    gained, last = values[0] - values[-1], values[-2] - values[-1]
    epochs = number_of(run.result.get("epochs"))
    # A rate that has fallen to zero flattens any curve: half of what the share of steps would be.
    share = (measured[-1][0] - measured[-2][0]) / max(measured[-1][0], 1)
    if values[-1] > min(values) or gained <= 0 or last < STILL_FALLING * min(1, 2 * share) * gained:
        return None
    what = "reward" if name == "reward" else "validation loss"
    passes = f"; the run saw {percent(epochs)} of its data" if epochs and epochs < 1 else ""
    more = f"`train.epochs={max(1, round(2 * epochs))}`" if epochs else "more epochs"
    if number_of(run.recipe.get("train.max_steps")):
        more += " and no `train.max_steps`"
    return Finding(
        "under-trained",
        "warn",
        "More training would help",
        f"the last {what}, {figure(measured[-1][1])}, is the best one, and "
        f"{percent(last / gained)} of all that was gained came since the one before{passes}",
        more,
    )


def not_better(run: RunRecord) -> Finding | None:
    """Validation is not better than before training."""
    name = run.measure
    measured = points_of(run.of_kind("evaluation"), name)
    if len(measured) < 2 or measured[0][0] != 0:
        return None
    values = [-y if name == "reward" else y for _, y in measured]
    if min(values[1:]) < values[0]:
        return None
    what = "reward" if name == "reward" else "validation loss"
    later = figure(min(measured[1:], key=lambda p: p[1] if name == "loss" else -p[1])[1])
    return Finding(
        "not-better",
        "bad",
        "Validation did not get better",
        f"{what} before training {figure(measured[0][1])}, best after it {later}",
        f"{lower_rate(run, 5)}; look at what is trained on with `tunesmith preview`",
    )


HARDLY = 0.02


def hardly_changed(run: RunRecord) -> Finding | None:
    """The loss moved so little that the rate is probably too small."""
    measured = points_of(run.of_kind("evaluation"), "loss")
    if run.measure == "reward" or len(measured) < 2 or measured[0][0] != 0 or not run.is_finished:
        return None
    before, best = measured[0][1], min(y for _, y in measured[1:])
    if not 0 < before - best < HARDLY * abs(before):
        return None
    rate = number_of(run.recipe.get("train.learning_rate"))
    higher = f"`train.learning_rate={3 * rate:.2g}`" if rate else "a higher train.learning_rate"
    return Finding(
        "hardly-changed",
        "warn",
        "Training hardly changed anything",
        f"validation loss fell by {percent((before - best) / before)} from {figure(before)}",
        f"{higher}, or more epochs",
    )


MEMORY_OFF = 1.25


def memory_off(run: RunRecord) -> Finding | None:
    """More memory was needed than predicted."""
    predicted = run.figure("predicted_peak_of_steps_bytes")
    measured = run.figure("peak_of_steps_bytes")
    warned = [e for e in run.of_kind("warning") if "out of memory" in str(e.get("message"))]
    if warned:
        evidence = str(warned[-1]["message"])
    elif predicted and measured and measured > MEMORY_OFF * predicted:
        gib = [f"{each / 2**30:.2f}" for each in (predicted, measured)]
        evidence = f"predicted peak {gib[0]} GiB, measured {gib[1]} GiB"
    else:
        return None
    return Finding(
        "memory",
        "warn",
        "Memory was tighter than predicted",
        evidence,
        "a smaller `train.micro_batch_tokens`, if other programs need the memory",
    )


def slowed_down(run: RunRecord) -> Finding | None:
    """The speed fell to half on the way: another program, heat, or swapping."""
    speeds = [y for _, y in points_of(run.of_kind("step"), "tokens_per_second")][1:]
    windows = window_means(speeds, parts=4)
    drops = [after for before, after in pairwise(windows) if after < 0.5 * before]
    if len(speeds) < 20 or not drops:
        return None
    return Finding(
        "slowed-down",
        "warn",
        "Training became much slower on the way",
        f"tokens per second by quarters of the run: {', '.join(figure(each) for each in windows)}",
        "look for other programs on the machine, heat, or swapping",
    )
