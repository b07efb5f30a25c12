"""Rows 1 to 9: a run that was killed, or changed, goes on."""

from __future__ import annotations

from pathlib import Path

from fault_rows.bench import FAIL, HALF, LATER, NONE, PASS, Bench, Verdict, reason, together
from fault_rows.spec import Fault

LOSS_TOLERANCE = 1e-6


def killed_between_steps(bench: Bench) -> Verdict:
    """Row 1."""
    return together(
        [
            _killed(bench, [Fault("kill_step", step) for step in steps], dropout)
            for dropout, steps in ((0.0, (5, 14, 19)), (0.1, (10,)))
        ]
    )


def _killed(bench: Bench, faults: list[Fault], dropout: float) -> Verdict:
    oracle = bench.oracle(dropout=dropout)
    found: list[Verdict] = []
    for fault in faults:
        folder = bench.fresh()
        outcome = bench.run(folder, bench.spec(dropout=dropout, fault=fault))
        if outcome.code != -9:
            return Verdict(LATER, f"the kill after step {fault.step} did not strike: {outcome.end}")
        verdict = bench.judge_resume(folder, oracle, bench.resume(folder, dropout=dropout))
        found.append(verdict)
    steps = ", ".join(str(fault.step) for fault in faults)
    bad = [verdict for verdict in found if verdict.score != PASS]
    if not bad:
        return Verdict(PASS, f"dropout {dropout}: equal to the bit, killed after {steps}")
    text = "; ".join(verdict.evidence for verdict in bad)
    return Verdict(FAIL, f"dropout {dropout}: {len(bad)} of {len(found)} unequal ({text})")


def killed_in_later_epochs(bench: Bench) -> Verdict:
    """Row 2."""
    oracle = bench.oracle()
    planned = bench.tool.rows(oracle)
    parts: list[Verdict] = []
    for step in (9, 13):
        folder = bench.fresh()
        if bench.run(folder, bench.spec(fault=Fault("kill_step", step))).code != -9:
            return Verdict(LATER, "the kill did not strike")
        outcome = bench.resume(folder)
        trained = bench.tool.rows(folder)
        wrong = [each for each in planned if trained.get(each) != planned[each]]
        if outcome.is_finished and not wrong:
            parts.append(Verdict(PASS, f"killed after {step}: the planned rows in all 20 steps"))
        elif outcome.is_finished:
            parts.append(Verdict(FAIL, f"killed after {step}: other rows in steps {wrong}"))
        else:
            parts.append(Verdict(FAIL, f"killed after {step}: {reason(outcome)}"))
    return together(parts)


def random_data_side(bench: Bench) -> Verdict:
    """Row 3."""
    fault = Fault("kill_step", 14)
    if bench.is_own:
        verdict = _killed(bench, [fault], 0.1)
        return Verdict(
            verdict.score, f"takes no collators; random numbers of its own, {verdict.evidence}"
        )
    if not bench.tool.has_collator:
        return Verdict(NONE, "takes no collators")
    oracle = bench.oracle(has_random_collator=True)
    folder = bench.fresh()
    bench.run(folder, bench.spec(has_random_collator=True, fault=fault))
    outcome = bench.resume(folder, has_random_collator=True)
    return bench.judge_resume(folder, oracle, outcome)


def killed_in_a_window(bench: Bench) -> Verdict:
    """Row 4."""
    fault = Fault("kill_micro", 13, bench.second_micro(13))
    return _killed(bench, [fault], 0.0)


def other_micro_batch(bench: Bench) -> Verdict:
    """Row 7."""
    oracle, folder = bench.oracle(), bench.broken()
    outcome = bench.resume(folder, micro_batch=2)
    if not outcome.is_finished:
        return Verdict(FAIL, f"resume: {outcome.end}, {reason(outcome)}")
    losses, expected = bench.tool.losses(folder), bench.tool.losses(oracle)
    worst = max(abs(losses.get(step, 9e9) - expected[step]) for step in expected)
    rows, planned = bench.tool.rows(folder), bench.tool.rows(oracle)
    if bench.is_own:  # its rows are told by tokens here, the loss being looked at apart
        rows, planned = ({k: v[:2] for k, v in each.items()} for each in (rows, planned))
    same = sum(rows.get(step) == planned[step] for step in planned)
    text = f"{same} of {len(planned)} steps with the planned rows, losses within {worst:.1g}"
    is_good = same == len(planned) and worst <= LOSS_TOLERANCE
    return Verdict(PASS if is_good else FAIL, text)


def data_edited(bench: Bench) -> Verdict:
    """Row 8."""
    folder = bench.broken()
    path = folder / "data.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("answer 289", "answer 290"), encoding="utf-8")
    outcome = bench.resume(folder)
    said = [line for line in bench.new_lines(outcome) if "data" in line and "chang" in line]
    if not outcome.is_finished:
        return Verdict(
            PASS if said else HALF, f"{outcome.end}: {' '.join(said) or reason(outcome)}"[:200]
        )
    return Verdict(
        HALF if said else FAIL, said[0].strip() if said else "went on with the edited row, silently"
    )


def config_edited(bench: Bench) -> Verdict:
    """Row 9."""
    parts = [
        _config_edit(bench, "learning_rate", learning_rate=0.02),
        _config_edit(bench, "seed", seed=43),
    ]
    outcome = bench.resume(bench.broken(), log_every=2)
    text = "a harmless edit (logging) is let through"
    if not outcome.is_finished:
        text = f"refuses a harmless edit, {reason(outcome)}"
    parts.append(Verdict(PASS if outcome.is_finished else FAIL, text))
    if all(part.score == FAIL for part in parts[:2]):
        return Verdict(FAIL, "; ".join(part.evidence for part in parts[:2]))
    return together(parts)


def _config_edit(bench: Bench, name: str, **change: float) -> Verdict:
    folder = bench.broken()
    outcome = bench.resume(folder, **change)
    said = [line for line in bench.new_lines(outcome) if name in line and "loss" not in line]
    if not outcome.is_finished:
        return Verdict(PASS if said else HALF, f"{name}: refused, {outcome.end}")
    effect = _effect(bench, folder)
    if said:
        return Verdict(HALF, f"{name}: says {said[0].strip()[:80]!r}, {effect}")
    return Verdict(FAIL, f"{name}: nothing said, {effect}")


def _effect(bench: Bench, folder: Path) -> str:
    difference = bench.difference(folder, bench.oracle())
    return f"final weights differ by {difference:.2g}" if difference else "the edit is ignored"
