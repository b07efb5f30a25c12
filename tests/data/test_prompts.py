"""Rows of prompts for policies: with a reference or without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.runs import make_run
from tunesmith.config.recipe import SourceConfig
from tunesmith.data.columns import to_sample
from tunesmith.errors import Problem
from tunesmith.rollout.prompts import prompts_of
from tunesmith.types import Completion, Conversation, Origin

SOURCE = SourceConfig(path="x.jsonl", format="prompt")
USER = [{"role": "user", "content": "What is 2+2?"}]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": USER}, ""),
        ({"messages": [*USER, {"role": "assistant", "content": "4"}]}, "4"),
        ({"prompt": USER, "answer": "4"}, "4"),
        ({"prompt": USER, "solution": 4}, "4"),
        ({"prompt": USER, "reward_model": {"ground_truth": "4", "style": "rule"}}, "4"),
        ({"prompt": "What is 2+2?"}, ""),
        ({"problem": "What is 2+2?", "answer": ["4", "four"]}, '["4", "four"]'),
        ({"question": "What is 2+2?", "answer": "2+2\n#### 4"}, "2+2\n#### 4"),
        ({"instruction": "What is", "input": "2+2?", "output": "4"}, "4"),
        ({"conversations": [{"from": "human", "value": "What is 2+2?"}]}, ""),
        ({"题目": "What is 2+2?", "答案": "4"}, "4"),
        ({"prompt": "What is 2+2?", "system": "Be brief.", "ground_truth": "4"}, "4"),
    ],
)
def test_a_prompt_and_its_reference(row: dict[str, Any], reference: str) -> None:
    sample = to_sample(row, SOURCE, Origin("x.jsonl", 1))
    if isinstance(sample, Completion):
        assert sample.prompt == "What is 2+2?"
        assert sample.completion == reference
        return
    assert isinstance(sample, Conversation)
    *before, asked, answer = sample.messages
    assert (asked.content or "").replace("\n", " ") == "What is 2+2?"
    assert (answer.role, answer.content) == ("assistant", reference)
    assert [message.role for message in before] == ["system"] * ("system" in row)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"chosen": "a"}, "data.columns"),
        ({"prompt": ""}, "data.empty-text"),
        ({"messages": []}, "data.empty-text"),
        ({"prompt": None}, "data.columns"),
    ],
)
def test_what_is_no_prompt_is_a_problem(row: dict[str, Any], code: str) -> None:
    problem = to_sample(row, SOURCE, Origin("x.jsonl", 7))
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where) == (code, "x.jsonl:7")


def test_prompts_end_where_inference_begins_to_answer(
    tiny_recipe: Callable[..., Path], write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"Say {n}"} for n in range(6)] + [
        {"messages": [*USER, {"role": "assistant", "content": "4"}, *USER], "answer": "four"}
    ] * 2
    objective = {"name": "grpo", "rewards": "math", "max_new_tokens": 4}
    data = {"train": str(write_jsonl(rows, "prompts.jsonl")), "validation": 0}
    with make_run(tiny_recipe(data=data, objective=objective, method="lora")) as run:
        tokenizer: Any = run.rollouts.judge.tokenizer  # pyright: ignore
        prompts = prompts_of(run.loader, [0, 6], tokenizer)
    start = "<|im_start|>assistant\n"
    assert prompts[0].text == f"<|im_start|>user\nSay 0<|im_end|>\n{start}"
    assert prompts[0].reference == ""
    turn = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    assert prompts[1].text == f"{turn}{start}4<|im_end|>\n{turn}{start}"
    assert prompts[1].reference == "four"
