"""What a chat template can express, found out by asking it once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2 import TemplateError

from tunesmith.types import Conversation, Message, Tokenizer

PROBE = "Probe7"


@dataclass(frozen=True, slots=True)
class Traits:
    """A template's abilities, and whether plain text starts with the BOS token at inference.

    `tail_space` is the white space that ends the text behind an answer, `end_marks` are the special
    tokens in that text; `call_arguments`
    says whether a tool call's arguments must be an object or JSON text, None if calls vanish or
    fail either way; `shows_tools` and `shows_reasoning` tell whether these are written.
    """

    tail_space: str
    end_marks: tuple[str, ...]
    call_arguments: Literal["object", "text"] | None
    shows_tools: bool
    shows_reasoning: bool
    adds_bos: bool


def probe_traits(apply: Callable[..., str], tokenizer: Tokenizer) -> Traits:
    """Renders a few tiny conversations and looks at what comes out.

    Args:
        apply: renders messages, with `tools=` and the like.
        tokenizer: whose special tokens may end an answer.
    """

    def render(messages: list[dict[str, Any]], **kwargs: Any) -> str:
        try:
            return apply(messages, **kwargs)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return ""

    user = {"role": "user", "content": "q"}
    plain = render([user, {"role": "assistant", "content": PROBE}])
    tail = plain.rpartition(PROBE)[2]
    specials = {str(tokenizer.eos_token), *tokenizer.all_special_tokens}
    marks = tuple(sorted(mark for mark in specials if mark in tail))
    schema = {"type": "function", "function": {"name": PROBE, "parameters": {"type": "object"}}}
    thought = {"role": "assistant", "content": "a", "reasoning_content": PROBE}
    return Traits(
        tail_space=tail[len(tail.rstrip()) :],
        end_marks=marks,
        call_arguments=_probe_call_arguments(render, user),
        shows_tools=PROBE in render([user], tools=[schema]),
        shows_reasoning=PROBE in render([user, thought]) or _opens_thinking(render, user),
        adds_bos=adds_bos(tokenizer),
    )


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether inference on plain text starts with the BOS token (add_bos_token)."""
    encoded = tokenizer.backend_tokenizer.encode_batch(["a"], add_special_tokens=True)[0]
    return bool(tokenizer.bos_token) and encoded.tokens[0] == str(tokenizer.bos_token)


def _opens_thinking(render: Callable[..., str], user: dict[str, Any]) -> bool:
    """Whether the generation prompt opens a thinking block: the reasoning then goes there."""
    return render([user], add_generation_prompt=True).rstrip().endswith("<think>")


def _probe_call_arguments(
    render: Callable[..., str], user: dict[str, Any]
) -> Literal["object", "text"] | None:
    """The first spelling whose call and arguments appear, unescaped, in the text."""
    spellings: tuple[tuple[Literal["object", "text"], Any], ...] = (
        ("object", {"key": "value7"}),
        ("text", '{"key": "value7"}'),
    )
    for name, arguments in spellings:
        function = {"name": PROBE, "arguments": arguments}
        call = {"id": "call_0", "type": "function", "function": function}
        text = render([user, {"role": "assistant", "content": "", "tool_calls": [call]}])
        if PROBE in text and '"value7"' in text:
            return name
    return None


def spell_schemas(sample: Conversation, *, with_format: bool) -> Conversation:
    """Writes the tool schemas into the system message, for templates that leave them out.

    The form is that of Hermes and Qwen; `with_format` adds how a call is to be written.
    """
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in sample.tools)
    text = (
        "You may call one or more functions. Their signatures stand within <tools></tools>:\n"
        f"<tools>\n{lines}\n</tools>"
    )
    if with_format:
        text += (
            "\nTo call one, answer with a JSON object within <tool_call></tool_call>:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
        )
    messages = list(sample.messages)
    if messages and messages[0].role == "system":
        text = f"{messages.pop(0).content}\n\n{text}"
    return Conversation((Message("system", text), *messages), sample.origin)


def spell_calls(sample: Conversation) -> Conversation:
    """Writes calls as JSON within <tool_call> and results within <tool_response>, as text."""
    messages = tuple(_spell_message(message) for message in sample.messages)
    return Conversation(messages, sample.origin, sample.tools)


def _spell_message(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n'
        "</tool_call>"
        for call in message.tool_calls
    )
    content = "\n".join(part for part in (message.content, calls) if part)
    return Message("assistant", content, reasoning=message.reasoning, weight=message.weight)


def spell_reasoning(sample: Conversation) -> Conversation:
    """Writes reasoning as a <think> block before the answer's text."""
    messages = tuple(
        replace(
            message,
            content=f"<think>\n{message.reasoning.strip()}\n</think>\n\n{message.content or ''}",
            reasoning=None,
        )
        if message.reasoning
        else message
        for message in sample.messages
    )
    return Conversation(messages, sample.origin, sample.tools)
