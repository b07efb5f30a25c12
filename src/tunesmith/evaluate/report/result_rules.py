"""Rules of the diagnosis about what went in and what came out: data, rewards, evaluations."""

from __future__ import annotations

import re
from statistics import fmean

from tunesmith.evaluate.report.curves import points_of
from tunesmith.evaluate.report.evaluations import newest_with
from tunesmith.evaluate.report.finding import Finding
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.shapes import number_of
from tunesmith.evaluate.report.wording import (
    figure,
    metric_name,
    p_value,
    percent,
    signed,
)

# Data

COUNTED_NOTE = re.compile(
    r"^([\d,]+) samples(?: of validation)? (longer than [\d,]+ tokens, .+|"
    r"with problems, left out.*|without anything to learn, left out)$"
)
TOTAL = re.compile(r"([\d,]+) samples to train on")
MANY_LOST = 0.02
"""Of the samples that are cut or left out: worth a word."""


def number_in(text: str) -> int:
    """A number with commas."""
    return int(text.replace(",", ""))


def lost_rows(run: RunRecord) -> Finding | None:
    """Many samples were cut or left out."""
    total = TOTAL.search(str(run.start.get("overview", "")))
    matches = [match for note in run.notes if (match := COUNTED_NOTE.match(note))]
    matches = [match for match in matches if "cut into pieces" not in match[2]]
    if total is None or not matches:
        return None
    lost = sum(number_in(match[1]) for match in matches)
    share = lost / max(1, number_in(total[1]))
    if share < MANY_LOST:
        return None
    is_length = any("longer than" in match[2] for match in matches)
    return Finding(
        "lost-rows",
        "warn",
        "Many samples were cut or left out",
        f"{percent(share)} of the samples: " + "; ".join(match[0] for match in matches),
        "a larger `data.max_length`, or `data.overlong=split`"
        if is_length
        else "`tunesmith check` names each of them",
    )


THIN = 0.02


def thin_mask(run: RunRecord) -> Finding | None:
    """Hardly any token carries loss."""
    steps = run.of_kind("step")
    tokens = sum(number_of(step.get("tokens")) or 0 for step in steps)
    supervised = sum(number_of(step.get("supervised_tokens")) or 0 for step in steps)
    if not tokens or supervised >= THIN * tokens:
        return None
    return Finding(
        "thin-mask",
        "warn",
        "Hardly any token is learned from",
        f"{percent(supervised / tokens)} of the tokens carry loss",
        "look with `tunesmith preview` whether the answers are where they should be",
    )


# Sampled answers

EQUAL = 0.7


def no_signal(run: RunRecord) -> Finding | None:
    """Most groups of sampled answers have equal rewards: nothing can be learned from them."""
    shares = [y for _, y in points_of(run.of_kind("step"), "equal_groups")]
    if not shares or fmean(shares) < EQUAL:
        return None
    return Finding(
        "no-signal",
        "warn",
        "Most sampled answers are judged alike",
        f"in {percent(fmean(shares))} of the groups all answers have the same reward",
        "prompts that are neither too easy nor too hard, a finer reward, or a higher "
        "`objective.temperature`",
    )


# Results

WARN_NATS = 0.2
"""A rise of the loss on general text by so much: its perplexity has grown by a fifth."""


def forgets(run: RunRecord) -> Finding | None:
    """The model does worse on general text than before."""
    measured = points_of(run.of_kind("evaluation"), "general_loss")
    if len(measured) < 2:
        return None
    best_step = number_of(run.result.get("best_step"))
    kept = next((y for x, y in measured if x == best_step), measured[-1][1])
    rise = kept - measured[0][1]
    if rise < WARN_NATS:
        return None
    return Finding(
        "forgets",
        "warn",
        "It forgets what it knew",
        f"loss on general text rose from {figure(measured[0][1])} to {figure(kept)} "
        f"({signed(rise)} nats a token)",
        "`data.replay=0.1` with general data, fewer epochs, or a lower learning rate",
    )


def got_worse(run: RunRecord) -> Finding | None:
    """A metric of the newest evaluation is worse than before."""
    evaluation = newest_with(run.evaluations)
    worse = [
        each
        for each in (evaluation.comparisons.values() if evaluation else ())
        if each.verdict == "worse"
    ]
    if not worse:
        return None
    evidence = "; ".join(
        f"{metric_name(each.metric)} {figure(each.before)} → {figure(each.after)} "
        f"({p_value(each.p_value)})"
        for each in worse[:4]
    )
    advice = "look at the broken rows above; `tunesmith preview` shows what was trained"
    return Finding("got-worse", "bad", "Something got worse", evidence, advice)


STOPS = 0.9


def does_not_stop(run: RunRecord) -> Finding | None:
    """Answers run into the limit instead of ending."""
    evaluation = newest_with(run.evaluations)
    after = evaluation.model("after") if evaluation else None
    score = after.scores.get("stop_rate") if after else None
    if score is None or score.value >= STOPS:
        return None
    return Finding(
        "does-not-stop",
        "warn",
        "Answers do not end by themselves",
        f"{percent(1 - score.value)} of the answers ran into the limit of tokens",
        "look for `data.no-end` with `tunesmith check`; or a larger `--max-new-tokens`",
    )


def no_effect(run: RunRecord) -> Finding | None:
    """The tuned model answers like the one before."""
    evaluation = newest_with(run.evaluations)
    changed = evaluation.effect.get("answers_changed") if evaluation else None
    if changed is None or changed > 0:
        return None
    return Finding(
        "no-effect",
        "bad",
        "Every answer is the same as before",
        "none of the answers changed by training",
        "a higher `train.learning_rate`, more epochs; and is the right model evaluated?",
    )
