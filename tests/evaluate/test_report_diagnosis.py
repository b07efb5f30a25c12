"""Each rule of the diagnosis finds its planted fault, and says nothing of a sound run."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from report_runs import (
    comparison,
    done,
    evaluations,
    falling,
    ordinary_run,
    score,
    start,
    steps,
    write_evaluation,
    write_run,
)
from tunesmith.evaluate.report.diagnosis import RULES, diagnose
from tunesmith.evaluate.report.reading import read_run

FLAT = {0: 1.0, 30: 0.3, 60: 0.299}
"""Validations of a run that learned all there was."""


def skip(step: int) -> dict[str, Any]:
    found = {"event": "skip", "step": step, "time": 1.0, "samples": ["a.json:7", "a.json:9"]}
    return {**found, "message": "not learned from"}


def planted() -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Events with one fault each, and a piece of what must be said of it."""
    sound = [*steps(falling(60)), *evaluations(FLAT)]
    rewards = [{**e, "reward": 0.5} for e in evaluations({0: -0.5, 60: -0.5})]
    slow = steps(falling(60), tokens_per_second=100.0)[40:]
    lost = start(notes=["120 samples longer than 512 tokens, their end is cut off"])
    memory = {"peak_of_steps_bytes": 3 * 2**30, "predicted_peak_of_steps_bytes": 2 * 2**30}
    return {
        "diverged": (
            [*steps([*falling(30), *falling(30, 1.0, 4.0)]), *evaluations(FLAT), done()],
            "`train.learning_rate=0.0002`",
        ),
        "rate-too-high": ([*sound, skip(5), skip(6), done()], "2 steps not learned from (first 5)"),
        "no-validation": ([*steps(falling(60)), done()], "`data.validation=0.1`"),
        "over-trained": (
            [*steps(falling(60)), *evaluations({0: 1.0, 20: 0.3, 60: 0.5}), done(epochs=3.0)],
            "about 1.0 epochs instead of 3.0",
        ),
        "under-trained": (
            [*steps(falling(60)), *evaluations({0: 1.0, 30: 0.6, 60: 0.4}), done(epochs=1.0)],
            "33 % of all that was gained",
        ),
        "not-better": (
            [*steps(falling(60)), *evaluations({0: 1.0, 30: 1.2, 60: 1.21}), done()],
            "before training 1.00, best after it 1.20",
        ),
        "hardly-changed": (
            [*steps(falling(60, 1.0, 0.99)), *evaluations({0: 1.0, 60: 0.99}), done()],
            "`train.learning_rate=0.003`",
        ),
        "lost-rows": ([lost, *sound, done()], "12 % of the samples"),
        "thin-mask": (
            [*steps(falling(60), supervised_tokens=5), *evaluations(FLAT), done()],
            "0.5 % of the tokens carry loss",
        ),
        "no-signal": (
            [*steps(falling(60), equal_groups=0.9, reward=0.5), *rewards, done()],
            "in 90 % of the groups",
        ),
        "forgets": (
            [
                *steps(falling(60)),
                *(
                    {**event, "general_loss": 2.0 + event["step"] / 100}
                    for event in evaluations(FLAT)
                ),
                done(best_step=60),
            ],
            "from 2.00 to 2.60 (+0.600 nats a token)",
        ),
        "memory": ([*sound, done(**memory)], "predicted peak 2.00 GiB, measured 3.00 GiB"),
        "slowed-down": ([*steps(falling(40)), *slow, *evaluations(FLAT), done()], "450, 450"),
        "unfinished": (sound, "60 of 60; nothing is saved yet"),
    }


@pytest.mark.parametrize("rule", planted())
def test_a_planted_fault_is_found(rule: str, tmp_path: Path) -> None:
    events, said = planted()[rule]
    found = {each.rule: each for each in diagnose(read_run(write_run(tmp_path / "run", events)))}
    assert rule in found
    assert said in f"{found[rule].evidence}; {found[rule].advice}"
    # What a fault brings with it may be said, too; nothing else.
    beside = {"no-signal": {"not-better"}, "hardly-changed": {"under-trained"}}
    assert set(found) - {rule} <= beside.get(rule, set())


def test_a_sound_run_is_called_so(tmp_path: Path) -> None:
    random.seed(0)
    noisy = [0.3 + 0.7 * math.exp(-n / 15) + random.gauss(0, 0.03) for n in range(120)]
    norms = [{**each, "grad_norm": 0.4 + random.random()} for each in steps(noisy)]
    run = write_run(tmp_path / "run", [*norms, *evaluations(FLAT), done()])
    (finding,) = diagnose(read_run(run))
    assert (finding.rule, finding.level) == ("healthy", "good")


def test_gradients_that_leap_are_seen(tmp_path: Path) -> None:
    events = [*steps(falling(60)), *evaluations(FLAT), done()]
    for event in events[:60:10]:
        event["grad_norm"] = 80.0
    (finding,) = diagnose(read_run(write_run(tmp_path / "run", events)))
    assert finding.rule == "rate-too-high"
    assert "6 of 60 gradient norms over 8 times the median of 0.500" in finding.evidence


def test_losses_that_are_no_numbers_are_seen(tmp_path: Path) -> None:
    events = [*steps([*falling(50), *([None] * 10)]), *evaluations(FLAT), done()]
    found = diagnose(read_run(write_run(tmp_path / "run", events)))
    assert found[0].rule == "diverged"
    assert "not finite in 10 steps, first in step 51" in found[0].evidence


def test_what_an_evaluation_shows(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    worse = comparison("bleu", 40.0, 31.0, verdict="worse")
    models = [{"role": "after", "name": "m", "scores": {"stop_rate": score(0.4)}}]
    effect = {"answers_changed": 0.0}
    write_evaluation(run, models=models, comparisons=[worse], effect=effect)
    found = {each.rule: each.evidence for each in diagnose(read_run(run))}
    assert found["got-worse"] == "BLEU 40.0 → 31.0 (p < 0.001)"
    assert found["does-not-stop"] == "60 % of the answers ran into the limit of tokens"
    assert "no-effect" in found


def test_no_files_are_no_diagnosis(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert [rule(run) for rule in RULES if rule.__name__ != "unfinished"] == [None] * (
        len(RULES) - 1
    )


def test_the_rules_are_documented() -> None:
    root = Path(__file__).resolve().parents[2]
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", (root / "docs/report.md").read_text(), re.M))
    files = (root / "src/tunesmith/evaluate/report").glob("*_rules.py")
    named = {
        name
        for file in files
        for name in re.findall(r'Finding\(\s*"([a-z-]+)"', file.read_text(encoding="utf-8"))
    }
    assert documented == named
    assert len(named) == len(RULES)
