"""Rows 34 to 40: bad numbers, and memory that does not suffice."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from fault_rows.bench import FAIL, HALF, LATER, PASS, Bench, Verdict, reason, shorten
from fault_rows.rows_resume import LOSS_TOLERANCE
from fault_rows.spec import GLOBAL_BATCH, STEPS, Fault, Outcome, Spec, make_rows
from fault_rows.tools import read_weights

AT = 13


def nan_loss(bench: Bench) -> Verdict:
    """Row 34."""
    folder = bench.fresh()
    outcome = bench.run(folder, bench.spec(fault=Fault("nan", AT)))
    if bench.is_own and "step.micro" not in bench.hits(folder):
        return Verdict(LATER, "the fault did not strike")
    checkpoints = bench.tool.checkpoints(folder)
    bad = [path.name for path in checkpoints if not _is_finite(path / bench.tool.weights_name)]
    lines = [line.strip() for line in bench.new_lines(outcome) if _tells(line, "nan|finite")]
    losses = bench.tool.losses(folder)
    shown = {step: losses[step] for step in (AT + 1, AT + 2) if step in losses}
    text = (
        f"{outcome.end}; losses told {shown}; {len(bad)} of {len(checkpoints)} checkpoints hold NaN"
    )
    said = f"; says {shorten(lines[0])!r}" if lines else "; says nothing"
    if bad:
        return Verdict(FAIL, text + said)
    named = any(str(number) in line for line in lines for number in (AT, AT + 1))
    return Verdict(PASS if named else HALF, text + said)


def _is_finite(path: Any) -> bool:
    return all(bool(np.isfinite(each).all()) for each in read_weights(path).values())


def _tells(line: str, words: str) -> bool:
    return re.search(rf"\b({words})\b", line, re.IGNORECASE) is not None


PLAIN_STEPS = 200
"""Steps of rows that are easy to learn; the spike comes behind them, far above all losses of the
last 128 steps."""


def loss_spike(bench: Bench) -> Verdict:
    """Row 36."""
    if bench.is_own:
        return _own_spike(bench)
    folder = bench.fresh(_plain_rows(PLAIN_STEPS * GLOBAL_BATCH + 72))
    outcome = bench.run(folder, _spec_of_spike(bench, fault=Fault("spike", PLAIN_STEPS, -10)))
    losses = bench.tool.losses(folder)
    text = _around_spike(losses)
    lines = [line.strip() for line in bench.new_lines(outcome) if _tells(line, "spike|skip.*")]
    if not lines:
        return Verdict(FAIL, f"{text}: learned from, nothing said")
    return Verdict(HALF, f"{text}: says {lines[0]!r}")


def _around_spike(losses: dict[int, float]) -> str:
    before, at = (losses.get(PLAIN_STEPS + more, math.nan) for more in (0, 1))
    return f"loss {before:.2g}, then {at:.2g} in step {PLAIN_STEPS + 1}"


def _spec_of_spike(bench: Bench, **changes: Any) -> Spec:
    return bench.spec(model=str(bench.models / "able"), epochs=1, **changes)


def _own_spike(bench: Bench) -> Verdict:
    """Three sources one after the other, so that the bad rows make up a step."""
    folder = bench.fresh(_plain_rows(PLAIN_STEPS * GLOBAL_BATCH))
    (folder / "data.jsonl").rename(folder / "first.jsonl")
    bench.tool.write_data(folder, [_row("hello", "\x7f\u00ff\u0101~#" * 6)] * GLOBAL_BATCH)
    (folder / "data.jsonl").rename(folder / "bad.jsonl")
    bench.tool.write_data(folder, _plain_rows(72))
    sources = ("first.jsonl", "bad.jsonl", "data.jsonl")
    outcome = bench.run(folder, _spec_of_spike(bench, sources=sources))
    events = bench.tool.events(folder, "step") if bench.is_own else []  # type: ignore[union-attr]
    losses = {each["step"]: each["loss"] for each in events}
    text = _around_spike(losses)
    lines = [
        line.strip()
        for line in bench.new_lines(outcome)
        if _tells(line, "spike|skip.*|left out|learned")
    ]
    if not outcome.is_finished:
        return Verdict(FAIL, f"{text}; {outcome.end}, {reason(outcome)}")
    says = f"says {shorten(lines[0])!r}" if lines else "says nothing"
    return Verdict(PASS if lines else FAIL, f"{text}; {says}")


def _plain_rows(count: int) -> list[dict[str, Any]]:
    return [_row(f"question {index}", "yes yes yes yes") for index in range(count)]


def _row(question: str, answer: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(roles, (question, answer), strict=True)
        ]
    }


def without_labels(bench: Bench) -> Verdict:
    """Row 38: 36 of 40 prompts are so long that the answer is cut off."""
    rows = make_rows()
    for row in rows[4:]:
        row["messages"][0]["content"] += " and so on" * 20
    folder = bench.fresh(rows)
    outcome = bench.run(folder, bench.spec())
    least = bench.tool.least_supervised(folder)
    lines = [
        line.strip()
        for line in bench.new_lines(outcome)
        if _tells(line, "samples|dropped|left out|skip.*|without")
    ]
    losses = bench.tool.losses(folder)
    nans = sum(not math.isfinite(loss) for loss in losses.values())
    weights = bench.tool.final_weights(folder)
    is_bad = any(not np.isfinite(each).all() for each in weights.values())
    text = f"{outcome.end}; the emptiest step has {least} labels; {nans} losses not finite"
    text += ", NaN in the final weights" if is_bad else ""
    if is_bad or nans:
        return Verdict(FAIL, text)
    if outcome.is_finished and least and not bench.is_own:
        if len(losses) < STEPS:
            return Verdict(HALF, f"{text}; such rows left out, not counted ({len(losses)} steps)")
        return Verdict(PASS, f"{text}: the cut leaves some of each answer, no step is without")
    if lines:
        # Who refuses these rows before the first step is right too, if it tells how many there are.
        is_good = outcome.is_finished or any(_tells(line, "36") for line in lines)
        return Verdict(PASS if is_good else HALF, f"{text}; says {shorten(lines[0])!r}")
    return Verdict(
        HALF if outcome.is_finished else FAIL, f"{text}; nothing said ({reason(outcome)})"
    )


def out_of_memory(bench: Bench) -> Verdict:
    """Row 40: more than two rows at once do not fit."""
    folder = bench.fresh()
    spec = bench.spec(fault=Fault("oom", 0, 2), finds_batch_size=not bench.is_own)
    outcome = bench.run(folder, spec)
    if bench.is_own and "step.micro" not in bench.hits(folder):
        return Verdict(LATER, "the fault did not strike")
    if not outcome.is_finished:
        return Verdict(FAIL, f"{outcome.end}, {reason(outcome)}")
    return _same_steps(bench, folder, outcome)


def _same_steps(bench: Bench, folder: Any, outcome: Outcome) -> Verdict:
    losses, expected = bench.tool.losses(folder), bench.tool.losses(bench.oracle())
    common = losses.keys() & expected.keys()
    worst = max((abs(losses[step] - expected[step]) for step in common), default=math.inf)
    sizes = ""
    if not bench.is_own:
        counts = sorted({len(rows) for rows in bench.tool.rows(folder).values()})
        sizes = f", rows in a step {counts} in place of {GLOBAL_BATCH}"
    text = f"goes on; {len(losses)} steps of {len(expected)}{sizes}, losses within {worst:.1g}"
    is_same = losses.keys() == expected.keys() and worst <= LOSS_TOLERANCE
    return Verdict(PASS if is_same else HALF, text)
