"""Metrics of special tasks: JSON, correction, classification, programs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from hand_made import predicted
from tunesmith.errors import UserError
from tunesmith.evaluate.metrics import MeasureOptions, measure
from tunesmith.evaluate.metrics.classification import auroc, average_precision, class_report
from tunesmith.evaluate.metrics.correction import edits_between, source_of, source_rule
from tunesmith.evaluate.metrics.labels import classify_probabilities, report_of
from tunesmith.evaluate.metrics.programs import program_of
from tunesmith.evaluate.metrics.structured import is_json, leaves
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Score, by_name
from tunesmith.types import SilentReporter

OPTIONS = MeasureOptions(resamples=50)


def figures(rows: list[Prediction], name: str, **options: object) -> dict[str, Score]:
    return by_name(measure(rows, [name], MeasureOptions(resamples=50, **options)))  # type: ignore[arg-type]


# JSON


def test_fields_are_compared_at_their_paths() -> None:
    label = '{"name": "Li", "tags": ["a", "b"], "size": {"w": 1, "h": 2.0}, "ok": true, "x": {}}'
    answer = '{"name": "Li ", "tags": ["b", "a"], "size": {"w": 1.0}, "ok": 1, "x": {}, "y": null}'
    found = figures([predicted(answer, label), predicted("sorry", label)], "json")
    assert found["json_valid"].rows == (1.0, 0.0)
    # Of 7 fields name, size.w and x are right; the answer has 7 of its own.
    assert found["json_field_accuracy"].rows == (3 / 7, 0.0)
    assert found["json_field_f1"].value == 2 * 3 / (14 + 7)
    assert leaves([]) != leaves({}) and leaves({"a": True}) != leaves({"a": 1})
    assert leaves({"a": []}) != leaves({"a": "[]"})


def test_json_is_all_of_the_answer() -> None:
    fenced = '```json\n{"a": 1}\n```'
    rows = [predicted(each, '{"a": 1}') for each in (fenced, '{"a": 1}', 'It is {"a": 1}', "NaN")]
    found = figures(rows, "json")
    assert found["json_valid"].rows == (0.0, 1.0, 0.0, 0.0)
    assert found["json_field_accuracy"].rows == (1.0, 1.0, 0.0, 0.0)
    assert not is_json("[" * 100_000) and not is_json("1") and is_json("[]")
    assert set(figures([predicted("1", "text")], "json")) == {"json_valid"}


def test_schemas() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"]}
    rows = [predicted(each, None) for each in ('{"a": 1}', '{"b": 1}', "null", "no")]
    assert figures(rows, "json", schema=schema)["json_schema_valid"].rows == (1.0, 0.0, 0.0, 0.0)
    with pytest.raises(UserError, match=r"evaluate\.schema"):
        figures(rows, "json", schema={"type": "thing"})
    with pytest.raises(UserError, match=r"which would be fetched"):
        figures(rows, "json", schema={"items": {"$ref": "https://example.org/a.json"}})


# Correction


def test_edits_are_merged_where_they_touch() -> None:
    assert edits_between("我的爱你", "我爱你") == {(1, 2, "")}
    assert edits_between("我爱你", "我很爱你们") == {(1, 1, "很"), (3, 3, "们")}
    assert edits_between("abcd", "axyzd") == {(1, 3, "xyz")}
    assert edits_between("abc", "abc") == set()
    assert edits_between("", "ab") == {(0, 0, "ab")}
    assert edits_between("ab", "") == {(0, 2, "")}
    # Which of two equal letters goes does not depend on what else changes.
    assert edits_between("他来了了", "他来了") == {(2, 3, "")}
    assert edits_between("他来了了", "她来了") == {(0, 1, "她"), (2, 3, "")}
    assert edits_between("他去了了", "他来") == {(1, 4, "来")}
    # A swap over a kept letter is two edits.
    assert edits_between("甲在乙", "乙在甲") == {(0, 1, "乙"), (2, 3, "甲")}


def test_edits_make_the_target() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        source, target = ("".join(chooser.choices("甲乙丙", k=chooser.randrange(9))) for _ in "ab")
        text = source
        for start, end, new in sorted(edits_between(source, target), reverse=True):
            text = text[:start] + new + text[end:]
        assert text == target


def asked(source: str, label: str, answer: str) -> Prediction:
    return predicted(answer, label, prompt=f"改正这个句子\n{source}")


def test_correction_counts_edits_over_the_corpus() -> None:
    rows = [
        asked("我的爱你们", "我爱你", "我爱你们"),  # one of two edits, and no wrong one
        asked("他来了了", "他来了", "她来了"),  # one right, one wrong
        asked("对的一句话", "对的一句话", "对的一句话"),
    ]
    found = figures(rows, "correction")
    assert found["correction_precision"].value == 2 / 3
    assert found["correction_recall"].value == 2 / 3
    assert found["correction_f05"].value == pytest.approx(2 / 3)
    assert found["correction_f05"].rows[2] == 1.0
    assert "source:after-first-line" in found["correction_f05"].signature
    idle = figures([asked("我的爱你", "我爱你", "我的爱你")], "correction")
    assert [each.value for each in idle.values()] == [0.0, 0.0, 0.0]
    spoilt = figures([asked("我爱你", "我爱你", "我爱")], "correction")
    assert [each.value for each in spoilt.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("改正这个句子\n这句话有有错误", "after-first-line"),
        ("改正下面的句子：这句话有有错误", "colon"),
        ("这句话有有错误", "message"),
        ("一\n\n二\n三\n\n这句话有有错误", "last-line"),
        ("What is wrong here?", None),
    ],
)
def test_the_source_sentence_is_found(prompt: str, rule: str | None) -> None:
    rows = [predicted("", "这句话有错误", prompt=prompt)]
    assert source_rule(rows, OPTIONS) == rule
    if rule is not None:
        assert source_of(rows[0], rule) == "这句话有有错误"
    bare = [predicted("", "这句话有错误", prompt=prompt, messages=())]
    assert source_rule(bare, OPTIONS) == rule


def test_the_source_sentence_can_be_named() -> None:
    rows = [predicted("这句有错", "这句有错", prompt="把「这句有有错」改好，谢谢！")]
    with pytest.raises(UserError, match=r"evaluate\.no-source"):
        figures(rows, "correction")
    found = figures(rows, "correction", source_pattern="「(.*?)」")
    assert found["correction_f05"].value == 1.0


# Classification


def test_answers_outside_of_the_labels_are_wrong_and_counted() -> None:
    pairs = [("Yes", "yes"), ("no", "yes"), ("No ", "no"), ("perhaps", "no"), ("x", None)]
    found = figures([predicted(*pair) for pair in pairs], "classification")
    assert found["accuracy"].value == 0.5 and found["accuracy"].num_rows == 4
    assert found["invalid"].value == 0.25
    assert found["precision"].value == 1.0 and found["recall"].value == 0.5
    assert found["f1"].value == pytest.approx(2 / 3)
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 0.5) / 2)
    assert "positive:yes" in found["f1"].signature and found["f1"].rows == ()
    report = report_of([predicted(*pair) for pair in pairs], OPTIONS)
    assert report.labels == ("no", "yes") and report.confusion == ((1, 0, 1), (1, 1, 0))
    assert report.num_invalid == 1 and report.support == (2, 2)


def test_the_positive_class_is_known_or_given() -> None:
    rows = [predicted("ham", "ham"), predicted("eggs", "eggs")] * 3
    assert "precision" not in figures(rows, "classification")
    found = figures(rows, "classification", positive_class=" Ham", betas=(0.5, 2.0))
    assert {"f0.5", "f2"} < set(found)
    with pytest.raises(UserError, match=r"evaluate\.positive-class"):
        figures(rows, "classification", positive_class="spam")


def test_log_probabilities_of_answers_rank_them() -> None:
    def row(answer: str, label: str, chance: float) -> Prediction:
        return predicted(answer, label, logprobs=((answer, math.log(chance)),))

    rows = [
        row("yes", "yes", 0.9),
        row("yes", "no", 0.6),
        row("no", "yes", 0.6),
        row("no", "no", 0.9),
    ]
    found = figures(rows, "classification")
    # Chances of yes: 0.9, 0.6, 0.4, 0.1; of 4 pairs one is the wrong way round.
    assert found["auroc"].value == 0.75
    assert found["auprc"].value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["auroc"].low is not None


def test_a_classifiers_probabilities() -> None:
    real = ["a", "b", "a", None]
    chances = [
        {"a": 0.9, "b": 0.1},
        {"a": 0.6, "b": 0.4},
        {"a": 0.7, "b": 0.3},
        {"a": 1.0, "b": 0.0},
    ]
    found = {
        each.name: each
        for each in classify_probabilities(real, chances, MeasureOptions(positive_class="a"))
    }
    assert found["accuracy"].value == 2 / 3 and found["auroc"].value == 1.0
    assert found["auroc"].num_rows == 3


def test_one_class_alone_has_no_area() -> None:
    assert math.isnan(auroc([True, True], [0.1, 0.2]))
    assert math.isnan(average_precision([False], [0.5]))
    real, chances = ["a", "a"], [{"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}]
    found = classify_probabilities(real, chances, MeasureOptions(positive_class="a"))
    assert {"accuracy", "auprc"} <= {each.name for each in found}
    assert "auroc" not in {each.name for each in found}
    with pytest.raises(UserError, match=r"evaluate\.positive-class"):
        classify_probabilities(real, chances, MeasureOptions(positive_class="c"))


class Listening(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_figures_without_a_value_are_left_out_with_a_word() -> None:
    reporter = Listening()
    options = MeasureOptions(resamples=5, reporter=reporter)
    rows = [predicted("yes", "yes", logprobs=(("yes", -0.1),))] * 2
    options = replace(options, labels=("yes", "no"))
    assert "auroc" not in by_name(measure(rows, ["classification"], options))
    assert measure([predicted("x", "")], ["cer"], options) == []
    assert [note.split(":")[0] for note in reporter.notes] == ["auroc", "cer"]


@pytest.mark.slow
def test_figures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    chooser = random.Random(7)
    labels = ("a", "b", "c", "never real", "never answered")
    for size in (5, 40, 300):
        real = chooser.choices(("a", "b", "c", "never answered"), k=size)
        answered = [r if chooser.random() < 0.6 else chooser.choice(labels[:4]) for r in real]
        ours = class_report(real, answered, labels)
        theirs = metrics.precision_recall_fscore_support(
            real, answered, labels=list(labels), zero_division=0
        )
        assert ours.precision == pytest.approx(theirs[0], abs=1e-12)
        assert ours.recall == pytest.approx(theirs[1], abs=1e-12)
        assert ours.f1 == pytest.approx(theirs[2], abs=1e-12)
        assert list(ours.support) == list(theirs[3])
        matrix = metrics.confusion_matrix(real, answered, labels=list(labels))
        assert [list(row[:-1]) for row in ours.confusion] == matrix.tolist()
        assert ours.accuracy == pytest.approx(metrics.accuracy_score(real, answered), abs=1e-12)
        for average, value in (("macro", ours.macro_f1), ("weighted", ours.weighted_f1)):
            expected = metrics.f1_score(
                real, answered, labels=list(labels), average=average, zero_division=0
            )
            assert value == pytest.approx(expected, abs=1e-12)
        is_positive = [r == "a" for r in real]
        # Rounded, so that there are ties.
        scores = [round(chooser.random() * 0.6 + 0.3 * p, 1) for p in is_positive]
        assert auroc(is_positive, scores) == pytest.approx(
            metrics.roc_auc_score(is_positive, scores), abs=1e-12
        )
        assert average_precision(is_positive, scores) == pytest.approx(
            metrics.average_precision_score(is_positive, scores), abs=1e-12
        )
        rows = [predicted(a, r) for a, r in zip(answered, real, strict=True)]
        found = figures(
            [
                predicted("yes" if r.prediction == "a" else "no", "yes" if r.label == "a" else "no")
                for r in rows
            ],
            "classification",
            betas=(0.5, 2.0),
        )
        flat = [a == "a" for a in answered]
        for beta in (0.5, 2.0):
            expected = metrics.fbeta_score(is_positive, flat, beta=beta, zero_division=0)
            assert found[f"f{beta:g}"].value == pytest.approx(expected, abs=1e-12)


# Programs


def test_the_program_is_the_first_block_of_python() -> None:
    assert program_of("x = 1") == "x = 1"
    assert (
        program_of("Run\n```bash\nls\n```\nthen\n```python\nx = 1\n```\n```python\ny\n```")
        == "x = 1"
    )
    assert program_of("```\nx = 1\n```") == "x = 1"
    assert program_of("```python\nx = 1\ny = 2") == "x = 1\ny = 2"


def test_programs_are_run_only_with_leave() -> None:
    rows = [predicted("def f(x):\n    return x + 1", "assert f(1) == 2")]
    with pytest.raises(UserError, match=r"(?s)evaluate\.code-not-allowed.*--allow-code"):
        figures(rows, "code")
    wrong = predicted("def f(x):\n    return x", "assert f(1) == 2")
    cheat = predicted("import sys; sys.exit(0)", "assert False")
    found = figures([*rows, wrong, cheat, predicted("x", None)], "code", allows_code=True)
    assert found["code_pass"].rows == (1.0, 0.0, 0.0, None)
    own = figures([predicted("y = 1", None, id="7")], "code", allows_code=True, tests={"7": "y"})
    assert own["code_pass"].value == 1.0
    with pytest.raises(UserError, match=r"evaluate\.no-tests"):
        figures([predicted("x", " ")], "code", allows_code=True)
