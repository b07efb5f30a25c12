"""The registry, `measure`, what auto picks, and metrics of single answers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_made import predicted
from tunesmith.errors import EvaluationError, UserError
from tunesmith.evaluate.metrics import METRICS, MeasureOptions, compare_predictions, measure
from tunesmith.evaluate.metrics.auto import fitting_metrics
from tunesmith.evaluate.metrics.distance import common_length, edit_distance
from tunesmith.evaluate.metrics.endings import is_looping
from tunesmith.evaluate.metrics.text import normalize, script_of, units, words
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import by_name

OPTIONS = MeasureOptions(resamples=50)
FREE = [predicted("the cat sat", f"the dog number {n} sat down") for n in range(9)]


def value(name: str, rows: list[Prediction]) -> float:
    return by_name(measure(rows, [name], OPTIONS))[name].value


def row_values(name: str, rows: list[Prediction]) -> tuple[float | None, ...]:
    return by_name(measure(rows, [name], OPTIONS))[name].rows


# Texts


def test_texts_are_cut_by_their_writing() -> None:
    assert words("I ate 3 Äpfel, 在北京。 1.5") == [
        "i",
        "ate",
        "3",
        "äpfel",
        "在",
        "北",
        "京",
        "1",
        "5",
    ]
    assert units("在，ab!") == ["在", "，", "ab", "!"]
    assert words("ラーメン") == list("ラーメン")
    assert normalize(" Ａ，１ ") == "A,1"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain English", "spaced"),
        ("今天天气 very nice today", "zh"),
        ("今日はいい天気です", "ja"),
        ("안녕하세요 여러분", "spaced"),
        ("สวัสดีครับ", "unspaced"),
        ("a long English sentence with one 字 in it", "spaced"),
        ("12 + 3 = ?", "spaced"),
        ("", "spaced"),
    ],
)
def test_the_writing_is_found(text: str, script: str) -> None:
    assert script_of([text]) == script


# Distances


def slow_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def slow_common(first: str, second: str) -> int:
    row = [0] * (len(second) + 1)
    for a in first:
        above, row = row, [0]
        for j, b in enumerate(second, 1):
            row.append(above[j - 1] + 1 if a == b else max(above[j], row[-1]))
    return row[-1]


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_distances_by_bits_are_those_of_the_table(first: str, second: str) -> None:
    assert edit_distance(first, second) == slow_distance(first, second)
    assert common_length(first, second) == slow_common(first, second)


def test_distances_of_long_texts() -> None:
    chooser = random.Random(0)
    first, second = ("".join(chooser.choices("abcd", k=n)) for n in (300, 200))
    assert edit_distance(first, second) == slow_distance(first, second)
    assert common_length(first, second) == slow_common(first, second)
    assert edit_distance([1, 2, 3], [1, 3]) == 1


# Answers against labels


def test_exact_match_takes_width_and_outer_space_for_nothing() -> None:
    rows = [predicted(" ＯＫ，", "OK,"), predicted("ok,", "OK,"), predicted("x", None)]
    assert row_values("exact_match", rows) == (1.0, 0.0, None)
    assert value("exact_match", rows) == 0.5


def test_contains_and_token_f1() -> None:
    rows = [predicted("It is the Eiffel tower.", "Eiffel Tower"), predicted("no", "Eiffel Tower")]
    assert row_values("contains", rows) == (1.0, 0.0)
    # it, is, eiffel, tower against eiffel, tower.
    assert row_values("token_f1", rows) == (pytest.approx(2 * 2 / 6), 0.0)
    assert value("token_f1", [predicted("在北京。", "北京")]) == pytest.approx(2 * 2 / 5)
    assert value("token_f1", [predicted("the", "A")]) == 1.0


def test_edits_and_error_rates() -> None:
    rows = [predicted("abcd", "abxde"), predicted("", "ab"), predicted("x", "")]
    assert row_values("edit_distance", rows) == (2.0, 2.0, 1.0)
    assert row_values("edit_similarity", rows) == (pytest.approx(0.6), 0.0, 0.0)
    assert value("cer", rows) == 5 / 7
    assert row_values("cer", rows) == (0.4, 1.0, None)
    assert value("wer", [predicted("the cat sat", "the big cat sat")]) == 0.25
    assert value("wer", [predicted("北京好", "北京很好")]) == 0.25


def test_thinking_is_not_compared() -> None:
    rows = [predicted("<think>\nyes or no?\n</think>\n\nyes", "yes"), predicted("<think>ye", "yes")]
    assert row_values("exact_match", rows) == (1.0, 0.0)
    assert row_values("edit_distance", rows) == (0.0, 3.0)
    loop = "<think>" + "and so again " * 9
    assert row_values("repeat_rate", [predicted(loop, "x")]) == (1.0,)


# How answers end


LOOPS = [
    "so I went home. " * 8,
    "good " + "answer again now then " * 4,
    "好的，" * 8,
    "ha " * 16,
    "x\n" + "一二三四" * 4,
]
NATURAL = [
    "ha ha ha ha",
    "very, very, very, very good",
    "哈哈哈哈",
    "| a | b |\n|---|---|---|---|---|---|---|---|\n",
    "=" * 80,
    "1. one\n2. two\n3. three\n4. four\n5. five",
    "",
    "......" * 10,
]


@pytest.mark.parametrize("text", LOOPS)
def test_planted_loops_are_found(text: str) -> None:
    assert is_looping(text, is_cut=False)
    assert is_looping(f"A fine beginning. {text} and an end", is_cut=False)


@pytest.mark.parametrize("text", NATURAL)
def test_natural_repetition_is_none(text: str) -> None:
    assert not is_looping(text, is_cut=False) and not is_looping(text, is_cut=True)


def test_a_cut_answer_loops_from_its_second_time_on() -> None:
    paragraph = " ".join(f"word{n}" for n in range(30))
    twice = f"{paragraph} {paragraph} word0 word1"
    assert is_looping(twice, is_cut=True) and not is_looping(twice, is_cut=False)
    assert not is_looping(paragraph, is_cut=True)
    rows = [predicted(twice, "a", finish_reason="length"), predicted(twice, "a")]
    assert row_values("repeat_rate", rows) == (1.0, 0.0)
    assert value("stop_rate", rows) == 0.5


def test_lengths() -> None:
    rows = [predicted("abcd", "ab"), predicted("ab", None, completion_tokens=7)]
    found = by_name(measure(rows, ["lengths"], OPTIONS))
    assert (found["answer_tokens"].value, found["length_ratio"].value) == (6.0, 2.0)
    assert found["length_ratio"].num_rows == 1
    assert set(by_name(measure([predicted("a", None)], ["lengths"], OPTIONS))) == {"answer_tokens"}


# measure


def test_scores_come_in_the_order_of_the_names_with_signatures() -> None:
    names = ["edits", "exact_match", "rouge_l", "bleu"]
    scores = measure(FREE, names, OPTIONS)
    assert [score.name for score in scores] == [
        "edit_distance",
        "edit_similarity",
        "exact_match",
        "rouge_l",
        "bleu",
    ]
    for score in scores:
        assert score.signature.startswith(f"{score.name}|") and len(score.rows) == len(FREE)
        assert score.low is not None and score.low <= score.value
        assert score.high is not None and score.value <= score.high


def test_every_metric_says_what_it_gives() -> None:
    rows = [predicted('{"a": 1}', '{"a": 1}'), predicted("abc", "abd")] * 3
    options = replace(OPTIONS, schema={"type": "object"}, allows_code=True, source="message")
    for name, metric in METRICS.items():
        assert name == metric.name
        if name in ("rouge_word", "rouge_llamafactory", "code"):
            continue
        for score in measure(rows, [name], options):
            assert metric.scores[score.name] == score.better
            assert metric.limits == "0 to 100" or score.value <= 5 or score.better == "neither"


def test_wrong_names_and_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)evaluate\.unknown-metric.*did you mean bleu\?"):
        measure(FREE, ["blue"])
    with pytest.raises(UserError, match=r"evaluate\.no-labels"):
        measure([predicted("a", None)], ["bleu"])
    with pytest.raises(EvaluationError, match=r"evaluate\.no-rows"):
        measure([], "auto")


def test_two_models_are_compared_on_the_rows_of_both() -> None:
    before = [predicted("x", "y", prompt=str(n)) for n in range(12)]
    after = [predicted("y", "y", prompt=str(n)) for n in reversed(range(2, 14))]
    first, second, found = compare_predictions(before, after, ["exact_match", "lengths"], OPTIONS)
    assert by_name(first)["exact_match"].num_rows == 10
    assert by_name(second)["exact_match"].value == 1.0
    assert [each.metric for each in found] == ["exact_match"]
    assert found[0].verdict == "better" and found[0].p_value == 2 / 2**10
    with pytest.raises(EvaluationError, match=r"evaluate\.unpaired"):
        compare_predictions(before[:2], after[:2])


# auto


def test_auto_goes_by_the_labels() -> None:
    def names(rows: list[Prediction]) -> list[str]:
        return fitting_metrics(rows, OPTIONS)[:2]

    classes = [predicted("", label) for label in ("yes", "no", "No ") * 3]
    assert names(classes) == ["classification", "exact_match"]
    assert names(classes[:1] * 9) == ["bleu", "chrf"]
    assert names([predicted("", f'{{"n": {n}}}') for n in range(9)]) == ["json", "exact_match"]
    asked = "改正语病\n这句话的有错误的地方"
    fixes = [predicted("", "这句话有错误的地方", prompt=f"{asked}{n}") for n in range(9)]
    assert names(fixes) == ["correction", "exact_match"]
    assert names(FREE) == ["bleu", "chrf"]
    assert names([predicted("a", None)]) == ["stop_rate", "repeat_rate"]
    numbers = [predicted("", str(n)) for n in range(40)]
    assert names(numbers) == ["bleu", "chrf"]
