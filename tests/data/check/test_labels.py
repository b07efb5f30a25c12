from __future__ import annotations

import pytest

from tunesmith.data.check.labels import (
    CommonAffixes,
    common_affixes,
    common_start,
    label_imbalance,
    task_kind,
)


@pytest.mark.parametrize(
    ("prompts", "answers", "kind"),
    [
        (["", " "], ["one", "two"], "open_ended"),
        ([f"text {i}" for i in range(9)], ["yes", "no"] * 4 + ["yes"], "classification"),
        (["a", "b", "c"], ["yes", "no", "maybe"], "conditional_generation"),
        (["a"] * 6, ["yes", "no"] * 3, "conditional_generation"),  # a third exactly is not below it
        ([], [], "open_ended"),
    ],
)
def test_task_kind(prompts: list[str], answers: list[str], kind: str) -> None:
    assert task_kind(prompts, answers) == kind


def test_labels_are_counted() -> None:
    found = label_imbalance(["sport"] * 80 + ["politics"] * 15 + [" politics", "Sport", "art"])
    assert found is not None
    assert found.counts == {"sport": 80, "politics": 16, "Sport": 1, "art": 1}
    assert list(found.counts) == ["sport", "politics", "Sport", "art"]
    assert found.num_answers == 98
    assert found.largest_label == "sport"
    assert found.largest_share == pytest.approx(80 / 98)
    assert found.singletons == ["Sport", "art"]
    assert found.variants == [["Sport", "sport"], [" politics", "politics"]]


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["yes"] * 5,
        [f"answer {i}" for i in range(100)],
        ["a long answer that is far more than a label can be, in so many words"] * 50,
        (f"answer {i % 1500}" for i in range(9000)),
    ],
)
def test_other_answers_are_no_labels(answers: list[str]) -> None:
    assert label_imbalance(answers) is None


@pytest.mark.parametrize(
    ("texts", "prefix", "suffix"),
    [
        ([], "", ""),
        (["positive", "negative"], "", ""),
        (["positive ->", "negative ->"], "", " ->"),
        (["a\n\n###\n\n", "b\n\n###\n\n"], "", "\n\n###\n\n"),
        (["Question: why", "Question: where"], "Question: ", ""),
        (["answer", "answers"], "", ""),
        (["yes END", "no END"], "", " END"),
        (["It rains.", "He won."], "", "."),
        (["正面", "负面"], "", ""),
        (
            ["检测这个句子的语法错误：甲", "检测这个句子的语法错误：乙"],
            "检测这个句子的语法错误：",
            "",
        ),
        (["检测这个句子的语法错误甲", "检测这个句子的语法错误乙"], "检测这个句子的语法错误", ""),
        (["翻译甲", "翻译乙"], "", ""),
        (["--", "---"], "--", ""),
    ],
)
def test_common_affixes(texts: list[str], prefix: str, suffix: str) -> None:
    found = common_affixes(texts)
    assert (found.prefix, found.suffix) == (prefix, suffix)


def test_equal_texts() -> None:
    assert common_affixes(["same", "same"]) == CommonAffixes("", "", True, 0)
    assert common_affixes(iter(())) == CommonAffixes("", "", False, 0)


def test_a_separator_inside_a_text_is_counted() -> None:
    found = common_affixes(["a -> b ->", "c ->", "d -> e -> f ->"])
    assert (found.suffix, found.num_suffix_inside) == (" ->", 2)


def test_common_start() -> None:
    assert common_start(["abc", "abd", "ab"]) == "ab"
    assert common_start(["same", "same"]) == "same"


def test_real_answers_are_no_labels(real_rows: dict[str, list[dict[str, str]]]) -> None:
    for rows in real_rows.values():
        prompts = [row["instruction"] for row in rows]
        answers = [row["output"] for row in rows]
        assert label_imbalance(answers) is None
        assert task_kind(prompts, answers) == "conditional_generation"
    grammar = [row["instruction"] + row["input"] for row in real_rows["instruction"]]
    assert common_affixes(grammar).prefix == "检测这个句子的语法错误"
