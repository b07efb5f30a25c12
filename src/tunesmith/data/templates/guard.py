"""Special tokens written inside texts: marked, so that they are encoded as the text they are.

A user who writes `<|im_end|>` in a question must not end the turn. Behind the first character of
such a spelling a mark is set, which no tokenizer has; `tokenize.py` encodes around it and takes it
out again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tunesmith.types import Conversation, Message, ToolCall

GUARD = "\ufdd0"
"""A noncharacter: Unicode promises that it never means anything in text."""


def guard_text(text: str, specials: Collection[str]) -> str:
    """The text with every spelling of a special token marked."""
    if GUARD in text:
        text = text.replace(GUARD, "")
    for token in specials:
        if token in text and len(token) > 1:
            text = text.replace(token, token[0] + GUARD + token[1:])
    return text


def guard_sample(sample: Conversation, specials: Collection[str]) -> Conversation:
    """The conversation with all its texts marked; the very same object if there was nothing."""
    messages = tuple(_guard_message(message, specials) for message in sample.messages)
    tools = sample.tools
    if tools:
        written = json.dumps(tools, ensure_ascii=False)
        if any(token in written for token in specials):
            tools = tuple(_guard_json(tool, specials) for tool in tools)
    if messages == sample.messages and tools == sample.tools:
        return sample
    return Conversation(messages, sample.origin, tools)


def _guard_message(message: Message, specials: Collection[str]) -> Message:
    return replace(
        message,
        content=message.content and guard_text(message.content, specials),
        reasoning=message.reasoning and guard_text(message.reasoning, specials),
        name=message.name and guard_text(message.name, specials),
        tool_calls=tuple(
            ToolCall(guard_text(call.name, specials), guard_text(call.arguments, specials))
            for call in message.tool_calls
        ),
    )


def _guard_json(value: Any, specials: Collection[str]) -> Any:
    if isinstance(value, str):
        return guard_text(value, specials)
    if isinstance(value, list):
        return [_guard_json(item, specials) for item in value]
    if isinstance(value, dict):
        return {guard_text(key, specials): _guard_json(v, specials) for key, v in value.items()}
    return value
