"""Rows of prompts that the model answers itself, with an answer to compare with if there is one."""

from __future__ import annotations

import json

from tunesmith.data.shapes.fields import MistakeError, text
from tunesmith.data.shapes.messages import check_order, check_tools, prompt_messages, read_tools
from tunesmith.data.shapes.pairs import (
    alpaca_prompt,
    before,
    messages_or_text,
    question_prompt,
)
from tunesmith.types import Completion, Conversation, Json, Message, Origin

PROMPT_COLUMNS = ("messages", "conversations", "instruction", "question", "prompt")
"""A prompt stands in one of these."""

ANSWER_NAMES = (
    *("solution", "ground_truth", "final_answer", "reference", "target", "label", "output"),
    *("response", "completion", "expected", "答案", "回答", "参考答案", "输出"),
)
PROMPT_NAMES = ("problem", "query", "input", "text", "content", "题目", "提示", "提示词", "输入")
"""Other names of `answer` and `prompt`, here alone."""


def from_prompt(row: dict[str, Json], origin: Origin) -> Conversation | Completion:
    """A prompt and the reference for its answer, which is empty where the row has none.

    The last answer of a conversation is the reference; so is the column `answer`, as text, and
    verl's `reward_model.ground_truth`.
    """
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        found = f"columns {', '.join(row) or 'none'}"
        raise MistakeError("data.columns", found, f"one of: {', '.join(PROMPT_COLUMNS)}")
    prompt = messages_or_text(row[column])
    if column in ("messages", "conversations") or isinstance(prompt, list):
        return _chat({**row, column: prompt}, column, origin)
    reference = _reference(row)
    if column == "prompt" and set(row) <= {"prompt", "answer", "reward_model"}:
        asked = text(prompt, "prompt")
        if not asked.strip():
            raise MistakeError("data.empty-text", "an empty prompt", "a prompt to answer", column)
        return Completion(asked, reference, origin)
    if column == "instruction":
        messages = alpaca_prompt(row)
    elif column == "question":
        messages = question_prompt(row)
    else:
        messages = (*before(row), Message("user", text(prompt, "prompt")))
    return _conversation((*messages, Message("assistant", reference)), row, origin)


def _chat(row: dict[str, Json], column: str, origin: Origin) -> Conversation:
    messages = prompt_messages(row, column)
    if not messages:
        raise MistakeError("data.empty-text", "no messages", "a conversation to answer", column)
    if messages[-1].role != "assistant":
        messages = (*messages, Message("assistant", _reference(row)))
    return _conversation(messages, row, origin)


def _conversation(
    messages: tuple[Message, ...], row: dict[str, Json], origin: Origin
) -> Conversation:
    tools = read_tools(row)
    check_order(messages)
    check_tools(messages, tools)
    return Conversation(messages, origin, tools)


def _reference(row: dict[str, Json]) -> str:
    value = row.get("answer")
    judged = row.get("reward_model")
    if value is None and isinstance(judged, dict):
        value = judged.get("ground_truth")
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
