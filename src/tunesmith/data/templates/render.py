"""Renders samples into spans: what the model reads, and what of it carries loss.

Each supervised answer stands behind exactly the text that inference would put before it: the
template's own render of the messages so far with `add_generation_prompt=True`. Answers share one
sequence while each prompt continues the text before it. Where it does not (Qwen3 writes a thinking
block into the last turn only and takes it out of earlier ones), the answer starts a sequence of
its own.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, TypeAlias

from jinja2 import TemplateError

from tunesmith.data.templates.choose import is_plain
from tunesmith.data.templates.traits import probe_traits, spell_calls, spell_schemas
from tunesmith.errors import Problem
from tunesmith.types import Completion, Conversation, Json, Message, Sample, Span, Tokenizer

Segment: TypeAlias = list[Span]
"""One sequence: spans in order."""

NO_END_MARK = "the chat template writes no end token after an answer: the EOS token is added"
TOOLS_AS_TEXT = "the chat template leaves tools out: their schemas go into the system message"
CALLS_AS_TEXT = (
    "the chat template has no place for tool calls: they are written as <tool_call> text"
)
EMPTY_THINKING = (
    "the chat template writes an empty thinking block before answers without reasoning: the model "
    "learns to answer directly (set data.template_arguments for another mode)"
)
SPLIT_TURNS = (
    "the chat template changes earlier turns when later ones follow: each answer of such a "
    "conversation is a sequence of its own, as inference sees it"
)


class Renderer:
    """Renders with one tokenizer's installed template and notes what is worth saying."""

    def __init__(self, tokenizer: Tokenizer, arguments: dict[str, Json] | None = None) -> None:
        self.tokenizer = tokenizer
        self.arguments = arguments or {}
        self.traits = probe_traits(tokenizer, self.arguments)
        self.is_plain = is_plain(tokenizer)
        self.notes: Counter[str] = Counter()
        self._said: set[str] = set()

    def render(self, sample: Sample) -> list[Segment] | Problem:
        """The sample's sequences, or what the template says against it.

        A prompt with a completion is one user and one assistant message, unless the template is
        the plain one: then it is their bare text with EOS.
        """
        self._said.clear()
        segments = self._render(sample)
        self.notes.update(self._said)
        return segments

    def _render(self, sample: Sample) -> list[Segment] | Problem:
        if isinstance(sample, Completion):
            if self.is_plain:
                return [self._render_bare(sample)]
            messages = (Message("user", sample.prompt), Message("assistant", sample.completion))
            sample = Conversation(messages, sample.origin)
        try:
            return self._render_conversation(self._fit_tools(sample))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            return Problem(
                str(sample.origin),
                "data.template",
                f"the chat template's refusal: {error}",
                "messages that the model's chat template can render",
            )

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The text before an answer, as inference builds it."""
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=True,
                **self.arguments,
            )
        )

    def _render_conversation(self, sample: Conversation) -> list[Segment]:
        messages = [self._as_dict(message) for message in sample.messages]
        tools: list[Any] = list(sample.tools)
        segments: list[Segment] = []
        text = ""
        for index, message in enumerate(sample.messages):
            if message.role != "assistant" or not message.weight:
                continue
            prompt = self.prompt(messages[:index], tools)
            prompt, answer, rest = self._answer(prompt, messages[: index + 1], tools, message)
            if segments and prompt.startswith(text):
                segments[-1].append(Span(prompt[len(text) :]))
            else:
                segments.append([Span(prompt)])
            segments[-1] += [Span(answer, message.weight), Span(rest)]
            text = prompt + answer + rest
        if len(segments) > 1:
            self._said.add(SPLIT_TURNS)
        return segments

    def _answer(
        self, prompt: str, messages: list[dict[str, Any]], tools: list[Any], message: Message
    ) -> tuple[str, str, str]:
        """(prompt, answer with its end mark, what follows), from the render with the answer."""
        full = str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, **self.arguments
            )
        )
        if full.startswith(prompt):
            answer = full[len(prompt) :]
        else:
            answer = self._after_opened_thinking(prompt, full, message)
        is_empty = "<think>" not in (message.content or "") and not message.reasoning
        if "<think>" in answer and is_empty:
            self._said.add(EMPTY_THINKING)
        found = [(answer.rfind(mark), mark) for mark in self.traits.end_marks if mark in answer]
        if found:
            start, mark = max(found)
            stop = start + len(mark)
            if not answer[stop:].strip():
                return prompt, answer[:stop], answer[stop:]
        self._said.add(NO_END_MARK)
        return (
            prompt,
            answer.removesuffix(self.traits.tail_space) + str(self.tokenizer.eos_token),
            "",
        )

    def _after_opened_thinking(self, prompt: str, full: str, message: Message) -> str:
        """The answer where the generation prompt opens a thinking block that history leaves out."""
        before, opened, inside = prompt.rpartition("<think>")
        if not opened or inside.strip() or not full.startswith(before):
            raise ValueError(
                f"its generation prompt ends in {prompt[-30:]!r}, which the answered text does not "
                "go on from"
            )
        return f"{message.reasoning or ''}\n</think>\n\n{full[len(before) :].lstrip()}"

    def _render_bare(self, sample: Completion) -> Segment:
        start = str(self.tokenizer.chat_template).startswith("{{ bos_token }}")
        prompt = (str(self.tokenizer.bos_token) if start else "") + sample.prompt
        answer = sample.completion + str(self.tokenizer.eos_token)
        # A bare prompt may end anywhere: two spaces at its end are one token alone, and two with a
        # word behind them. So the edge is always kept.
        return [Span(prompt), Span(answer, 1.0, starts_token=True)]

    def _fit_tools(self, sample: Conversation) -> Conversation:
        has_calls = any(m.tool_calls or m.role == "tool" for m in sample.messages)
        if has_calls and self.traits.call_arguments is None:
            self._said.add(CALLS_AS_TEXT)
            sample = spell_calls(sample)
        if sample.tools and not self.traits.shows_tools:
            self._said.add(TOOLS_AS_TEXT)
            sample = spell_schemas(sample, with_format=self.traits.call_arguments is None)
        return sample

    def _as_dict(self, message: Message) -> dict[str, Any]:
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            item["name"] = message.name
        if message.reasoning:
            item["reasoning_content"] = message.reasoning
        if message.tool_calls and self.traits.call_arguments is not None:
            is_text = self.traits.call_arguments == "text"
            item["content"] = message.content or ""
            item["tool_calls"] = [
                {
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if is_text else json.loads(call.arguments),
                    },
                }
                for index, call in enumerate(message.tool_calls)
            ]
        elif message.content is None:
            item["content"] = ""
        return item


def unroll(segment: Segment) -> list[tuple[str, Span]]:
    """Every answer of a sequence with all the text before it, as (prompt, answer) pairs."""
    pairs: list[tuple[str, Span]] = []
    text = ""
    for span in segment:
        if span.is_supervised:
            pairs.append((text, span))
        text += span.text
    return pairs
