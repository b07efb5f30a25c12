"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from report_runs import (
    RECIPE,
    evaluations,
    falling,
    ordinary_run,
    read_page,
    score,
    start,
    steps,
    write_evaluation,
    write_run,
)
from tunesmith.cli.main import app
from tunesmith.evaluate.compare import Line, compare_runs, write_comparison


def line(lines: tuple[Line, ...], name: str) -> list[str]:
    return next([cell.text for cell in each.cells] for each in lines if each.name == name)


def two_runs(tmp_path: Path, **scores: float) -> list[Path]:
    """Two runs that differ in rank and rate, the second a little better."""
    runs = [ordinary_run(tmp_path / name) for name in ("first", "second")]
    other = RECIPE.replace("rank: 16", "rank: 64").replace("rate: 0.001", "rate: 0.0003")
    (runs[1] / "recipe.resolved.yaml").write_text(other, encoding="utf-8")
    write_run(runs[1], [*steps(falling(60)), *evaluations({0: 1.0, 60: 0.2})], recipe=other)
    for run, after in zip(runs, (0.31, scores.get("second", 0.6)), strict=True):
        write_evaluation(run, after=after)
    return runs


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    found = compare_runs(two_runs(tmp_path))
    settings = {each.name: [cell.text for cell in each.cells] for each in found.settings}
    assert settings == {"method.rank": ["16", "64"], "train.learning_rate": ["0.001", "0.0003"]}
    assert found.warnings == ()
    assert line(found.results, "method") == ["lora r16 · sft", "lora r64 · sft"]
    assert line(found.results, "best validation loss") == ["0.250", "0.200"]
    best = {each.name: (each.best, each.is_clear) for each in found.results if each.best}
    assert best["best validation loss"] == ({1}, True)
    assert best["correction F0.5"] == ({1}, True)


def test_a_best_within_the_others_interval_is_not_clear(tmp_path: Path) -> None:
    found = compare_runs(two_runs(tmp_path, second=0.33))
    best = {each.name: (each.best, each.is_clear) for each in found.results if each.best}
    assert best["correction F0.5"] == ({1}, False)


def test_unfinished_runs_are_shown_as_such(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    write_run(tmp_path / "third", steps(falling(7)))
    found = compare_runs([*runs, tmp_path / "third"])
    assert line(found.results, "state")[2] == "unfinished, step 7 of 60"
    assert "not finished: third" in found.warnings
    assert line(found.results, "best validation loss")[2] == "–"


def test_other_data_is_warned_about_and_nothing_is_best(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    for run, value in zip(runs, "ab", strict=True):
        state = run / "checkpoints" / "step-00000030" / "state.json"
        state.parent.mkdir(parents=True)
        prints = {"tokenizer": "t", "instruction.json": value * 64, "settings of the data": value}
        state.write_text(json.dumps({"fingerprints": prints}))
    found = compare_runs(runs)
    assert found.warnings == (
        "other training or validation data (first | second): their figures do not compare",
    )
    names = {each.name for each in found.results if each.best}
    assert "best validation loss" not in names
    assert "correction F0.5" in names  # of the same rows


@pytest.mark.parametrize("change", ["rows", "signature"])
def test_scores_of_other_rows_or_settings_have_no_best(change: str, tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    if change == "rows":
        write_evaluation(runs[1], data={"label": "held_out.json", "rows": 50, "fingerprint": "x"})
    else:
        other: dict[str, Any] = {"correction_f0.5": {**score(0.6), "signature": "another|v2"}}
        write_evaluation(runs[1], models=[{"role": "after", "name": "m", "scores": other}])
    found = compare_runs(runs)
    assert "correction F0.5" not in {each.name for each in found.results if each.best}
    said = any("of other rows" in each for each in found.warnings)
    assert said == (change == "rows")


def test_rewards_and_losses_stand_apart(tmp_path: Path) -> None:
    runs = [ordinary_run(tmp_path / "sft"), tmp_path / "grpo"]
    rewards = evaluations({0: -0.1, 20: -0.8}, reward=0.8)
    write_run(runs[1], [start(), *steps(falling(20), reward=0.5), *rewards])
    found = compare_runs(runs)
    assert line(found.results, "best validation loss") == ["0.250", "–"]
    assert line(found.results, "best validation mean reward") == ["–", "0.800"]
    assert line(found.results, "training loss") == ["0.600", "–"]


def test_names_are_told_apart(tmp_path: Path) -> None:
    runs = [ordinary_run(tmp_path / parent / "run") for parent in "ab"]
    assert compare_runs(runs).names == (str(runs[0]), str(runs[1]))
    assert compare_runs([runs[0], runs[0]]).names == (f"{runs[0]} (1)", f"{runs[0]} (2)")


def test_the_page(tmp_path: Path) -> None:
    evil = tmp_path / "<script>alert(1)<"
    runs = [*two_runs(tmp_path), ordinary_run(evil)]
    page = read_page(write_comparison(compare_runs(runs), tmp_path / "out" / "page.html"))
    assert "Comparison of 3 runs" in page.text
    assert "Loss, validation" in page.text
    assert "<script>alert(1)<" in page.text
    assert "★" in page.text
    read_page(write_comparison(compare_runs([write_run(tmp_path / "empty")]), tmp_path / "e.html"))


def test_the_command(tmp_path: Path) -> None:
    names = [str(run) for run in two_runs(tmp_path)]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", *names, "-o", str(page)])
    assert result.exit_code == 0, result.output
    for part in ("lora r64", "0.200 ★", "train.learning_rate", "held_out.json", "page.html"):
        assert part in result.output
    assert page.exists()
    many = CliRunner().invoke(app, ["compare", *names * 4], env={"COLUMNS": "100"})
    assert many.output.count("What differs") == 3  # three side by side
    result = CliRunner().invoke(app, ["compare", *names, "--json"])
    found = json.loads(result.output)
    assert [run["state"] for run in found["runs"]] == ["finished", "finished"]
    score_of = found["runs"][1]["evaluations"]["held_out.json"]["correction F0.5"]
    assert score_of == {"value": 0.6, "low": pytest.approx(0.55), "high": pytest.approx(0.65)}
    best = {each["name"]: each for each in found["best"]}
    assert best["best validation loss"]["runs"] == ["second"]
