"""Rows sorted by what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report_runs import four_rows, ordinary_run, row, score, write_evaluation
from tunesmith.evaluate.report.answers import AnswerTable, answer_table, spoken
from tunesmith.evaluate.report.evaluations import read_evaluations
from tunesmith.evaluate.report.metrics_table import metric_rows


def table_of(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> AnswerTable:
    run = ordinary_run(tmp_path / "run")
    write_evaluation(run, rows, **more)
    (evaluation,) = read_evaluations(run / "evaluation")
    found = answer_table(evaluation)
    assert found is not None
    return found


def counts(table: AnswerTable) -> dict[str, int]:
    return {group.kind: group.count for group in table.groups}


def test_flips_come_first(tmp_path: Path) -> None:
    table = table_of(tmp_path, four_rows())
    assert list(counts(table).items()) == [("broken", 1), ("fixed", 1), ("wrong", 1), ("right", 1)]
    assert table.measure == "exact match"
    (fixed,) = table.groups[1].rows
    assert fixed.where == "data/病句.json:1"
    assert fixed.facts == "exact match 0 → 1 · loss 0.9 → 0.5"


def test_texts_are_compared_where_no_metric_does(tmp_path: Path) -> None:
    rows = [{**each} for each in four_rows()]
    for each in rows:
        each["before"] = {**each["before"], "scores": {}}
        each["after"] = {**each["after"], "scores": {}}
    table = table_of(tmp_path, rows)
    assert counts(table) == {"broken": 1, "fixed": 1, "wrong": 1, "right": 1}
    assert table.measure == "equal to the data's answer"


def test_scores_that_only_rise_are_better_and_worse(tmp_path: Path) -> None:
    rows = []
    for number, (old, new) in enumerate(((0.1, 0.6), (0.5, 0.2), (0.3, 0.3)), 1):
        each = row(number, "标签", "以前", "以后")
        each["before"]["scores"] = {"correction_f0.5": old}
        each["after"]["scores"] = {"correction_f0.5": new}
        rows.append(each)
    table = table_of(tmp_path, rows)
    assert counts(table) == {"worse": 1, "better": 1, "same": 1}
    assert table.most_improved[0].where.endswith(":1")


def test_hardest_rows_have_the_highest_loss(tmp_path: Path) -> None:
    rows = four_rows()
    for number, each in enumerate(rows):
        each["after"] = {**each["after"], "loss": 0.1 * number}
    table = table_of(tmp_path, rows)
    assert [shown.where[-1] for shown in table.hardest] == ["4", "3", "2", "1"]
    assert [shown.where[-1] for shown in table.most_improved] == ["1", "2", "3", "4"]


def test_many_rows_are_counted_and_few_are_shown(tmp_path: Path) -> None:
    table = table_of(tmp_path, [row(n, "对", "错", "对") for n in range(50)])
    (group,) = table.groups
    assert (group.kind, group.count, len(group.rows)) == ("fixed", 50, 10)


def test_the_headline_is_what_tells_right_from_wrong(tmp_path: Path) -> None:
    scores = {name: score(0.5) for name in ("stop_rate", "mean_tokens", "bleu", "exact_match")}
    run = ordinary_run(tmp_path / "run")
    write_evaluation(run, models=[{"role": "after", "scores": scores}], comparisons=[])
    (evaluation,) = read_evaluations(run / "evaluation")
    assert evaluation.headline == "bleu"
    assert metric_rows(evaluation)[0].name == "BLEU"


def test_intervals_are_drawn_to_scale(tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "run")
    write_evaluation(run)
    (evaluation,) = read_evaluations(run / "evaluation")
    shown = metric_rows(evaluation)[0]
    assert (shown.name, shown.before, shown.after) == ("correction F0.5", "0.020", "0.310")
    assert shown.certainty == "+0.240 to +0.340, p < 0.001"
    before, after = shown.before_bar, shown.after_bar
    assert before is not None and after is not None
    assert 0 < before.low < before.value < before.high < after.low < after.high < 100


def test_a_rendered_prompt_is_shown_as_it_was_asked() -> None:
    chatml = (
        "<|im_start|>system\n你是老师<|im_end|>\n<|im_start|>user\n改错：\n我去了学校。<|im_end|>\n"
    )
    assert spoken(chatml + "<|im_start|>assistant\n") == ("改错：\n我去了学校。", "你是老师")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    llama = f"<s>{header.format('user')}Hi<|eot_id|>{header.format('assistant')}"
    assert spoken(llama) == ("Hi", "")
    assert spoken("[INST] Hi [/INST]") == ("Hi", "")
    assert spoken("plain text") == ("plain text", "")
    assert spoken("<s>") == ("<s>", "")
