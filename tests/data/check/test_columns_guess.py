from __future__ import annotations

import pytest

from tunesmith.data.check.columns_guess import looks_swapped

Pairs = list[tuple[str, str]]
ARTICLE = "The council met on Monday to talk about park number {0}. Nobody agreed. " * 5


def swapped(pairs: Pairs) -> Pairs:
    return [(answer, prompt) for prompt, answer in pairs]


def joined(rows: list[dict[str, str]]) -> Pairs:
    return [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [("What is it?", "A thing.")] * 5,
        [(f"I liked film {i} a lot", "positive" if i % 2 else "negative") for i in range(60)],
        [(f"Is film {i} any good?", "yes" if i % 2 else "no") for i in range(60)],
        [(ARTICLE.format(i), f"Council argues over park {i}") for i in range(60)],
        [("Summarize: " + ARTICLE.format(i), f"Council argues, {i}") for i in range(60)],
        [("Write a question on this: " + ARTICLE.format(i), f"Who is {i}?") for i in range(60)],
        [(f"翻译成英文：第{i}句", f"Sentence number {i}") for i in range(60)],
        [(f"My film {i} is here", f"Check again: {i % 2}") for i in range(60)],
        [("", f"A text of its own, number {i}, and so on") for i in range(60)],
        [(f"my printer {i} is broken", f"I am sorry. Which model is it, {i}?") for i in range(60)],
    ],
)
def test_columns_in_place_are_left_alone(pairs: Pairs) -> None:
    assert looks_swapped(pairs) is None


def test_questions_in_the_answer_column() -> None:
    pairs = [(ARTICLE.format(i), f"What happened to park {i}?") for i in range(60)]
    reason = looks_swapped(pairs)
    assert reason is not None
    assert "100% of the answers read like questions or requests, but only 0%" in reason
    assert looks_swapped(swapped(pairs)) is None


def test_one_request_before_all_answers() -> None:
    pairs = [(f"这是第{i}句话。", f"检测这个句子的语法错误\n这是第{i}句话话。") for i in range(60)]
    reason = looks_swapped(pairs)
    assert reason == '100% of the answers begin with the request "检测这个句子的语法错误"'
    assert looks_swapped(swapped(pairs)) is None


def test_a_sample_is_enough() -> None:
    pairs = [(ARTICLE.format(i), f"What happened to park {i}?") for i in range(9000)]
    assert looks_swapped(pairs) is not None


def test_real_rows_are_in_place_and_seen_when_swapped(
    real_rows: dict[str, list[dict[str, str]]],
) -> None:
    for name, rows in real_rows.items():
        assert looks_swapped(joined(rows)) is None, name
        assert looks_swapped(swapped(joined(rows))) is not None, name
        only_instruction = [(row["instruction"], row["output"]) for row in rows]
        assert looks_swapped(only_instruction) is None, name
        assert looks_swapped(swapped(only_instruction)) is not None, name
