"""The report's page: whole for a whole run, and still a page for any part of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from report_runs import (
    SENTENCES,
    done,
    evaluations,
    falling,
    four_rows,
    ordinary_run,
    read_page,
    row,
    start,
    steps,
    write_evaluation,
    write_run,
)
from tunesmith.cli.main import app
from tunesmith.errors import RunError
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.report.reading import read_events, read_run, reasons_in
from tunesmith.evaluate.report.verdict import verdict_of


def whole_run(folder: Path) -> Path:
    """A run with all that may be in its directory."""
    ordinary_run(folder)
    write_evaluation(folder)
    samples = folder / "samples"
    samples.mkdir()
    hard = {"origin": "data/病句.json:17", "epochs": [1.9, 1.8, 1.7], "tokens": 74}
    hard |= {"prompt": SENTENCES[3][0], "answer": "标注错了。"}
    (samples / "losses.json").write_text(json.dumps({"rows": [hard]}), encoding="utf-8")
    return folder


def test_a_whole_run(tmp_path: Path) -> None:
    path = write_report(whole_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = read_page(path)
    for part in (
        "Correction F0.5 rose from 0.020 to 0.310 (+0.290, 95 % +0.240 to +0.340, p < 0.001) "
        "on 100 rows of held_out.json.",
        "lora r16",
        "3:16 min",
        "KL from the model before: 0.210 nats a token (over 6,120 tokens)",
        "1 broken (right before, wrong after)",
        "1 fixed (wrong before, right after)",
        "Most improved rows",
        "Labels to check",
        "标注错了。",
        "loss by epoch: 1.90 → 1.80 → 1.70; 74 tokens",
        "1,021 rows; the best checkpoint is kept",
        "this cpu computes bfloat16 fast",
        "best 0.250",
        "tunesmith evaluate runs/grammar held_out.json",
        "/recipe.resolved.yaml output=",
    ):
        assert part in " ".join(page.text.split()), part


def test_it_may_go_elsewhere(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    assert write_report(run, tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert not (run / "report.html").exists()


def test_it_is_a_function_of_the_files(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


EVERY_FILE = (
    "recipe.yaml",
    "recipe.resolved.yaml",
    "events.jsonl",
    "summary.json",
    "samples/losses.json",
    "samples/answers.jsonl",
    "evaluation/nacgec/evaluation.json",
    "evaluation/nacgec/rows.jsonl",
    "checkpoints/step-00000030/state.json",
)
WRONG = ('{"a": 1', "[1, 2]", "\x00\xff{", "[" * 1100 + "\n", '{"a":' * 300 + "1" + "}" * 300)
"""Half a file, another shape, no text, and nesting without end."""


@pytest.mark.parametrize("name", EVERY_FILE)
def test_any_file_may_be_missing_or_broken(name: str, tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    file = run / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    read_page(write_report(run))
    for wrong in WRONG:
        file.write_text(wrong, encoding="utf-8")
        write_report(run)
    file.unlink()
    file.mkdir()
    read_page(write_report(run))


ODD_VALUES: list[Any] = [None, "text", 3, [None, [1]], {"a": {"b": 2}}, float("nan")]


@pytest.mark.slow
def test_values_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    file = run / "evaluation" / "nacgec" / "evaluation.json"
    about = json.loads(file.read_text())
    for odd in ODD_VALUES:
        for changed in ("models", "comparisons", "data"):
            rest = dict.fromkeys(about.keys() - {"models", "comparisons", "data"}, odd)
            file.write_text(json.dumps({**about, **rest, changed: odd}))
            read_page(write_report(run))
    lines = run / "evaluation" / "nacgec" / "rows.jsonl"
    rows = [{**four_rows()[0], key: odd} for key in four_rows()[0] for odd in ODD_VALUES]
    lines.write_text("".join(json.dumps(each) + "\n" for each in rows))
    read_page(write_report(run))
    event = {**steps([1.0])[0], **start(), **evaluations({1: 1.0})[0]}
    kinds = ("start", "step", "evaluation", "done", "skip", "resume", "rollback", "warning")
    odd_events = [
        {"event": kind, "step": n, key: odd}
        for kind in kinds
        for n, key in enumerate(event)
        for odd in ODD_VALUES
    ]
    write_run(run, odd_events)
    read_page(write_report(run))
    losses = [{"epochs": odd, "prompt": odd, "tokens": odd, "origin": odd} for odd in ODD_VALUES]
    (run / "samples" / "losses.json").write_text(json.dumps({"rows": losses}))
    read_page(write_report(run))


@pytest.mark.parametrize("left", ["recipe.yaml", "events.jsonl", "summary.json"])
def test_a_run_that_died_early_has_a_report(left: str, tmp_path: Path) -> None:
    whole = whole_run(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    shutil.copy(whole / left, tmp_path / "run")
    read_page(write_report(tmp_path / "run"))


def test_a_run_that_was_killed_says_so(tmp_path: Path) -> None:
    saved = {"event": "checkpoint", "step": 10, "time": 9.0, "path": "checkpoints/step-00000010"}
    run = write_run(tmp_path / "run", [*steps(falling(17)), saved])
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 18, "lo')
    page = read_page(write_report(run))
    assert "not finished" in page.text
    assert "the last step that was logged is 17 of 60; the newest checkpoint is of step 10" in (
        page.text.lower()
    )
    assert "goes on where this run stopped" in page.text


def test_no_run_is_an_error(tmp_path: Path) -> None:
    for folder, found in ((tmp_path, "no run directory"), (tmp_path / "nix", "no such folder")):
        with pytest.raises(RunError, match=found) as caught:
            write_report(folder)
        assert caught.value.code == "run.none"


EVIL = '</script></style><script>alert(1)</script><img src=x onerror="alert(2)">\'"&'


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    run = tmp_path / "run"
    evil_row = row(1, EVIL, EVIL + "a", EVIL)
    evil_row |= {"path": EVIL, "messages": [{"role": EVIL, "content": EVIL}] * 2}
    evil_steps = steps(falling(5), **{EVIL: 1.0})
    ordinary_run(run)
    events = [start(overview=EVIL, notes=[EVIL], model=EVIL), *evil_steps]
    events += [{"event": "warning", "step": 1, "message": EVIL}]
    write_run(run, [*events, *evaluations({0: 1.0, 5: 0.5}, **{EVIL: 2.0})])
    write_evaluation(run, [evil_row], command=EVIL, notes=[EVIL], created=EVIL)
    (run / EVIL.replace("/", "_")).write_text("")
    page = read_page(write_report(run))
    text = (run / "report.html").read_text()
    assert text.count("<script") == 1 and text.count("<img") == 0
    assert EVIL in page.text


def test_odd_characters_do_not_break_it(tmp_path: Path) -> None:
    odd = "a\x00b\x07c\r\nd\ud800e\u202ef 😀龘𠮷"
    run = ordinary_run(tmp_path / "run")
    write_evaluation(run, [row(1, odd, odd + "x", odd)])
    text = write_report(run).read_text(encoding="utf-8")
    assert "a␀b␇c\nd?e\u202ef 😀龘𠮷" in text
    assert "\x00" not in text


def test_secrets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "q8Zr2Lw9Tn4Vb7Xc")
    key = "sk-proj-abcd1234efgh5678ijkl9012"
    run = ordinary_run(tmp_path / "run")
    secret = f"{key} q8Zr2Lw9Tn4Vb7Xc"
    write_evaluation(run, [row(1, secret, secret, "x")], command=f"tunesmith --key {secret}")
    write_run(run, [start(notes=[secret], overview=secret), *steps([1.0])])
    (run / "recipe.resolved.yaml").write_text(f"model: {{id: 'https://u:{key}@host/m'}}\n")
    text = write_report(run).read_text()
    assert key not in text and "q8Zr2Lw9Tn4Vb7Xc" not in text


@pytest.mark.slow
def test_the_size_is_bounded(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    long = "很长的回答。" * 3_000
    rows = [row(n, long, f"{n}{long}", f"{long}{n}") for n in range(4)]
    write_evaluation(run, rows)
    losses = [1 / n for n in range(1, 4_001)]
    write_run(run, [*steps(losses), *evaluations({n: 1 / (n + 1) for n in range(0, 4_001, 4)})])
    path = write_report(run)
    assert path.stat().st_size < 2_500_000
    page = read_page(path)
    assert "more characters, not in this page" in page.text


def test_answers_of_the_training_stand_in_for_an_evaluation(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    (run / "samples").mkdir()
    lines = [
        {"step": at, "origin": "d:1", "messages": [], "prompt": "问", "label": "好", "answer": text}
        for at, text in ((0, "不好"), (60, "好"))
    ]
    file = run / "samples" / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(write_report(run))
    assert "A few prompts, asked before training and at its end." in page.text
    assert "<mark>不</mark>好" in (run / "report.html").read_text()


def test_verdicts(tmp_path: Path) -> None:
    def verdict(*events: dict[str, Any]) -> tuple[str, str]:
        found = verdict_of(read_run(write_run(tmp_path / "run", events)))
        return found.text, found.tone

    text = "Validation loss fell from 1.00 to 0.250 (−75 %) at step 60 of 60, on 40 held-out rows."
    assert verdict(*evaluations({0: 1.0, 60: 0.25}), done()) == (text, "good")
    assert verdict(*evaluations({0: 1.0, 60: 1.5}), done())[1] == "bad"
    text = "Mean reward of held-out prompts rose from 0.500 to 0.700 (+0.200) at step 8 of 60"
    rewards = [{**evaluations({at: -r})[0], "reward": r} for at, r in ((0, 0.5), (8, 0.7))]
    assert verdict(*rewards) == (f"{text}, on 40 held-out rows.", "good")
    assert verdict(*steps([3.0, 2.0]))[0] == "Training loss went from 3.00 to 2.00 in 2 steps."
    assert verdict()[0] == "No step was trained."
    write_evaluation(tmp_path / "run", comparisons=[])
    assert (
        verdict()[0]
        == "Correction F0.5 is 0.310 on 100 rows of held_out.json; nothing was compared."
    )


def test_a_difference_that_is_none_is_not_praised(tmp_path: Path) -> None:
    from report_runs import comparison

    run = ordinary_run(tmp_path / "run")
    unclear = comparison("correction_f0.5", 0.3, 0.31, p_value=0.4, verdict="no clear difference")
    write_evaluation(run, comparisons=[unclear])
    found = verdict_of(read_run(run))
    assert found.tone == "open"
    assert found.text.startswith("No clear difference: correction F0.5 went from 0.300 to 0.310")


def test_events_are_read_as_the_engine_reads_them(tmp_path: Path) -> None:
    from tunesmith.engine.events import read_events as engine_reads

    warning = {"event": "warning", "step": 3, "time": 1.0, "message": "m"}
    events = [*steps([3.0, 2.0, 1.5]), warning, *steps([2.9, 1.9]), warning, *evaluations({0: 9.0})]
    run = write_run(tmp_path / "run", events)
    assert list(read_events(run / "events.jsonl")) == list(engine_reads(run / "events.jsonl"))


def test_reasons_stand_behind_values() -> None:
    text = "a:\n  b: 1  # one\n  c:\n    d: 'x  # y'\n    e: null  # two\nf: 2\n- g: 1\n"
    assert reasons_in(text) == {"a.b": "one", "a.c.e": "two"} | {"a.c.d": "y'"}


def test_the_command(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "Correction F0.5 rose" in result.output
    assert (tmp_path / "page.html").exists()


def test_it_needs_no_torch() -> None:
    import ast

    root = Path(__file__).resolve().parents[2] / "src" / "tunesmith"
    for file in [*(root / "evaluate" / "report").glob("*.py"), root / "evaluate" / "compare.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            names = [module, *(alias.name for alias in getattr(node, "names", []))]
            assert not any(str(name).startswith(("torch", "matplotlib")) for name in names), file


def test_earlier_evaluations_are_there_too(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    write_evaluation(run, name="new", after=0.4)
    older = {"created": "2026-01-01 00:00:00", "data": {"label": "older.json", "rows": 7}}
    write_evaluation(run, name="old", after=0.2, **older)
    page = read_page(write_report(run))
    assert "to 0.400" in page.text
    assert "Earlier evaluation of older.json" in page.text
