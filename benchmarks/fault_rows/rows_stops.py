"""Rows 26 to 30: two runs at once, and signals."""

from __future__ import annotations

import signal

from fault_rows.bench import (
    FAIL,
    GO,
    HALF,
    LATER,
    PASS,
    STOP,
    Bench,
    Verdict,
    reason,
    send,
    together,
    wait_for_step,
)
from fault_rows.spec import Fault

AT = 13


def two_runs(bench: Bench) -> Verdict:
    """Row 26."""
    folder = bench.fresh()
    first = bench.tool.server.start(folder, bench.spec())
    if not wait_for_step(bench.tool, first, folder, 5):
        return Verdict(LATER, "the first run was over too soon")
    send(first.pid, STOP)
    process = first.pid
    try:
        second = bench.resume(folder)
    finally:
        send(process, GO)
    ended = first.wait()
    if second.is_finished:
        text = f"the second run trains to its end in the same directory; the first: {ended.end}"
        return Verdict(FAIL, text)
    named = str(process) in second.log
    difference = bench.difference(folder, bench.oracle())
    text = f"the second: {second.end}, {reason(second)}; the first: {ended.end}"
    is_good = named and ended.is_finished and difference == 0
    return Verdict(PASS if is_good else HALF, text)


def terminated(bench: Bench) -> Verdict:
    """Row 28."""
    default = _terminated(bench)
    if bench.is_own:
        return default
    # It waits for 3 s before it acts.
    opted = _terminated(bench, has_jit_checkpoint=True, pause_seconds=2.0)
    best = max((default, opted), key=lambda each: (PASS, HALF, FAIL).index(each.score) * -1)
    text = f"as it comes: {default.evidence}; with enable_jit_checkpoint: {opted.evidence}"
    return Verdict(best.score, text)


def _terminated(bench: Bench, **options: object) -> Verdict:
    options = {"dropout": 0.1, **options}
    folder = bench.fresh()
    fault = Fault("term_micro", AT, bench.second_micro(AT))
    outcome = bench.run(folder, bench.spec(fault=fault, **options))
    if outcome.is_finished and len(bench.tool.losses(folder)) >= 20:
        return Verdict(LATER, "the signal was not heard")
    paths = bench.tool.checkpoints(folder)
    newest = bench.tool.step_of(paths[-1]) if paths else 0
    resumed = bench.judge_resume(folder, bench.oracle(dropout=0.1), bench.resume(folder, **options))
    text = f"{outcome.end}, newest checkpoint {newest}, {resumed.evidence}"
    if newest < AT:
        return Verdict(FAIL, f"nothing saved in step {AT + 1}: {text}")
    is_good = outcome.code == 143 and resumed.score == PASS
    return Verdict(PASS if is_good else HALF, text)


def interrupted_in_a_save(bench: Bench) -> Verdict:
    """Row 30."""
    if bench.is_own:
        once = Fault("planted", text=_in_a_save(bench, 0, "int"))
        twice = Fault("planted", text=f"step.micro:step={AT}:int,{_in_a_save(bench, 1, 'int')}")
    else:
        once, twice = Fault("int_file", 12, 3), Fault("int_micro", AT)
    return together(
        [
            _interrupted(bench, once, "one in a save"),
            _interrupted(bench, twice, "one in a step, another while it stops"),
        ]
    )


def _in_a_save(bench: Bench, extra: int, action: str) -> str:
    """The middle of tunesmith's third save, or of the one that a first signal asks for."""
    writes = bench.hits(bench.oracle()).count("save.write")
    saves = bench.hits(bench.oracle()).count("save.open")
    each = max(writes // max(saves, 1), 1)
    return f"save.write:{each * (2 + extra) + 2}:{action}"


def _interrupted(bench: Bench, fault: Fault, name: str) -> Verdict:
    folder = bench.fresh()
    outcome = bench.run(folder, bench.spec(fault=fault))
    if outcome.is_finished:
        return Verdict(LATER, f"{name}: the signal was not heard")
    resumed = bench.judge_resume(folder, bench.oracle(), bench.resume(folder))
    text = f"{name}: {outcome.end}, {resumed.evidence}"
    is_clean = outcome.code in (130, -signal.SIGINT)
    return Verdict(resumed.score if is_clean else min(resumed.score, HALF), text)
