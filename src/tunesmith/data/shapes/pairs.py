"""Rows of questions and answers in columns of their own, and raw text."""

from __future__ import annotations

import re

from tunesmith.data.shapes.fields import (
    MistakeError,
    from_json_text,
    optional_text,
    show,
    text,
)
from tunesmith.data.shapes.messages import conversation, read_messages, read_tools
from tunesmith.types import Completion, Conversation, Json, Message, Origin, Role, Text


def from_alpaca(row: dict[str, Json], origin: Origin) -> Conversation:
    """Alpaca's instruction, input, output with optional system, history and reasoning."""
    messages = (*alpaca_prompt(row), _answer(row, "output"))
    return conversation(messages, read_tools(row), origin)


def alpaca_prompt(row: dict[str, Json]) -> tuple[Message, ...]:
    """System, history, and the instruction with its input below it."""
    instruction = text(row["instruction"], "instruction")
    extra = optional_text(row.get("input"), "input")
    asked = "\n".join(part for part in (instruction, extra) if part)
    return (*before(row), Message("user", asked))


def from_question(row: dict[str, Json], origin: Origin) -> Conversation:
    """Question and answer; a context stands above the question."""
    messages = (*question_prompt(row), _answer(row, "answer"))
    return conversation(messages, read_tools(row), origin)


def question_prompt(row: dict[str, Json]) -> tuple[Message, ...]:
    """System, history, and the question with its context above it."""
    context = optional_text(row.get("context"), "context")
    question = text(row["question"], "question")
    asked = "\n\n".join(part for part in (context, question) if part)
    return (*before(row), Message("user", asked))


def from_completion(row: dict[str, Json], origin: Origin) -> Completion | Conversation:
    """Prompt and completion: two texts, or two lists of messages.

    With a column that only chats have (system, history, reasoning, tools) both are a conversation.
    """
    prompt = messages_or_text(row["prompt"])
    completion = messages_or_text(row["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = (*read_messages(prompt, "prompt"), *read_messages(completion, "completion"))
        return conversation(messages, read_tools(row), origin)
    # Asked of columns, not of cells: the rows of one table should not come to different templates.
    if any(column in row for column in ("system", "history", "reasoning", "tools", "functions")):
        question = Message("user", text(prompt, "prompt"))
        answer = _answer(row, "completion")
        return conversation((*before(row), question, answer), read_tools(row), origin)
    answer = text(completion, "completion")
    if not answer.strip():
        raise MistakeError(
            "data.empty-answer", "an empty completion", "some text to learn", "completion"
        )
    return Completion(text(prompt, "prompt"), answer, origin)


def messages_or_text(value: Json) -> Json:
    """The messages behind a cell's JSON text; other texts stay, JSON that is an answer too."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        items = from_json_text(value, "")
    except MistakeError:
        return value
    if isinstance(items, list) and items and all(_is_message(item) for item in items):
        return items
    return value


def _is_message(item: Json) -> bool:
    is_openai = isinstance(item, dict) and "role" in item and {"content", "tool_calls"} & set(item)
    return bool(is_openai) or (isinstance(item, dict) and "from" in item and "value" in item)


def from_text(row: dict[str, Json], origin: Origin) -> Text | Conversation:
    """Raw text, or (where it starts with their marks) Llama-Chinese's turns."""
    content = text(row["text"], "text")
    if LLAMA_CHINESE_START.match(content):
        return from_llama_chinese(row, origin)
    if not content.strip():
        raise MistakeError("data.empty-text", "an empty text", "some text to learn", "text")
    return Text(content, origin)


def from_llama_chinese(row: dict[str, Json], origin: Origin) -> Conversation:
    r"""One column of turns: `<s>Human: ...\n</s><s>Assistant: ...\n</s>`.

    The line break before `</s>` may be missing, as in the format's own documentation.
    """
    content = text(row["text"], "text")
    messages: list[Message] = []
    at = 0
    for turn in LLAMA_CHINESE_TURN.finditer(content):
        if content[at : turn.start()].strip():
            break
        messages.append(Message(LLAMA_CHINESE_ROLES[turn["role"]], turn["text"]))
        at = turn.end()
    if content[at:].strip() or not messages:
        raise MistakeError(
            "data.llama-chinese",
            show(content[at:]),
            "turns of the form <s>Human: ...</s><s>Assistant: ...</s>",
            "text",
        )
    return conversation(tuple(messages), (), origin)


LLAMA_CHINESE_TURN = re.compile(
    r"<s>\s*(?P<role>Human|Assistant|System)[:：] ?(?P<text>.*?)\n?</s>\s*", re.DOTALL
)
LLAMA_CHINESE_START = re.compile(r"\s*<s>\s*(Human|System)[:：]")
LLAMA_CHINESE_ROLES: dict[str, Role] = {
    "Human": "user",
    "Assistant": "assistant",
    "System": "system",
}


def before(row: dict[str, Json]) -> tuple[Message, ...]:
    """What stands before the question: a system message and earlier turns."""
    messages: list[Message] = []
    system = optional_text(row.get("system"), "system")
    if system:
        messages.append(Message("system", system))
    history = from_json_text(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise MistakeError(
            "data.history", show(history), "a list of [question, answer] pairs", "history"
        )
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise MistakeError(
                "data.history", show(turn), "a [question, answer] pair in history", "history"
            )
        messages.append(Message("user", text(turn[0], f"history[{index}][0]")))
        messages.append(Message("assistant", text(turn[1], f"history[{index}][1]")))
    return tuple(messages)


def _answer(row: dict[str, Json], column: str) -> Message:
    answer = text(row[column], column)
    reasoning = optional_text(row.get("reasoning"), "reasoning")
    if not answer.strip():
        raise MistakeError("data.empty-answer", f"an empty {column}", "something to learn", column)
    return Message("assistant", answer, reasoning=reasoning)
