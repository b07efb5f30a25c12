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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError

from tunesmith.data.templates.choose import is_plain
from tunesmith.data.templates.guard import guard_sample, guard_text
from tunesmith.data.templates.infill import InfillTokens, as_infill
from tunesmith.data.templates.sandbox import compile_template
from tunesmith.data.templates.skeleton import Skeleton, Skeletons, added_tokens
from tunesmith.data.templates.traits import (
    probe_traits,
    spell_calls,
    spell_reasoning,
    spell_schemas,
)
from tunesmith.data.templates.watch import watch_template
from tunesmith.errors import Problem
from tunesmith.types import (
    Completion,
    Conversation,
    Json,
    Labeled,
    Message,
    Preference,
    Rated,
    Sample,
    Span,
    Text,
    Tokenizer,
)

Segment: TypeAlias = list[Span]
"""One sequence: spans in order."""

NO_END_MARK = "the chat template writes no end token after an answer: the EOS token is added"
TOOLS_AS_TEXT = "the chat template leaves tools out: their schemas go into the system message"
CALLS_AS_TEXT = (
    "the chat template has no place for tool calls: they are written as <tool_call> text"
)
REASONING_AS_TEXT = (
    "the chat template has no place for reasoning: it is written as <think> text before the answer"
)
EMPTY_THINKING = (
    "the chat template writes an empty thinking block before answers without reasoning: the model "
    "learns to answer directly (set data.thinking for another mode)"
)
SPLIT_TURNS = (
    "the chat template changes earlier turns when later ones follow: each answer of such a "
    "conversation is a sequence of its own, as inference sees it"
)
FIRST_ANSWER = "an answer at the very start carries no loss: there is nothing that it answers"
SPECIAL_AS_TEXT = (
    "special tokens are written inside the texts: there they are encoded as plain text"
)

REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template may raise on messages that it does not like."""


@dataclass(frozen=True)
class RenderOptions:
    """What the recipe asks of rendering.

    Args:
        arguments: variables of the chat template.
        train_on: which answers carry loss: all, the last, or numbers (1 first, -1 last). Of rated
            samples it is always the last, and of pairs what follows the prompt.
        infill: share of raw texts turned into fill-in-the-middle tasks, with its tokens.
    """

    arguments: dict[str, Json] = field(default_factory=dict[str, Json])
    train_on: Literal["all", "last"] | tuple[int, ...] = "all"
    infill: tuple[float, InfillTokens] | None = None

    def key(self) -> str:
        """Text that differs where the options do."""
        return json.dumps([self.arguments, self.train_on, str(self.infill)], sort_keys=True)


class Renderer:
    """Renders with one tokenizer's installed template and notes what is worth saying."""

    def __init__(self, tokenizer: Tokenizer, options: RenderOptions | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options or RenderOptions()
        self.template = compile_template(str(tokenizer.chat_template))
        self.variables = {**tokenizer.special_tokens_map, **self.options.arguments}
        self.specials = frozenset(map(str, tokenizer.all_special_tokens))
        if self.options.infill is not None:
            # Few tokenizers call these special, but in a text they would be taken for the cuts.
            _, tokens = self.options.infill
            self.specials |= {tokens.prefix, tokens.suffix, tokens.middle}
        self.traits = probe_traits(self._apply, tokenizer)
        self.is_plain = is_plain(tokenizer)
        self.notes: Counter[str] = Counter()
        self._said: set[str] = set()
        self.watched = watch_template(self.template, str(tokenizer.chat_template))
        self.skeletons = self._make_skeletons()

    def render(self, sample: Sample) -> list[Segment] | Problem:
        """The sample's sequences, or what the template says against it.

        A prompt with a completion is one user and one assistant message, unless the template is
        the plain one: then it is their bare text with EOS. Of a preference pair, the chosen side's
        sequences come first.
        """
        self._said.clear()
        try:
            segments = self._render(sample)
        except REFUSALS as error:
            return refusal(sample, error)
        self.notes.update(self._said)
        return segments

    def find_skeleton(self, sample: Sample) -> tuple[Skeleton, list[str]] | None:
        """The rendered outline of the sample and its texts, where that says the same as `render`.

        Raises:
            SkeletonMismatchError: see `Skeletons`.
        """
        if self.skeletons is None or isinstance(sample, Text | Preference | Labeled):
            return None
        if isinstance(sample, Completion) and self.is_plain:
            return None
        try:
            found = self.skeletons.find(self._as_conversation(sample))
        except REFUSALS:
            return None
        if found is not None:
            self.notes.update(found[0].said)
        return found

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The text before an answer, as inference builds it."""
        return self._apply(messages, tools=tools or None, add_generation_prompt=True)

    def render_whole(self, sample: Conversation) -> str | Problem:
        """A conversation as the template writes it, whoever speaks last; nothing is left out."""
        self._said.clear()
        try:
            fitted = self._fit(self._guarded(sample))
            messages = [self._as_dict(message) for message in fitted.messages]
            text = self._apply(messages, tools=list(fitted.tools) or None)
        except REFUSALS as error:
            return refusal(sample, error)
        self.notes.update(self._said)
        return text

    def _apply(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        return self.template.render(messages, **self.variables, **kwargs)

    def _render(self, sample: Sample) -> list[Segment]:
        if isinstance(sample, Text):
            return [self._render_text(sample)]
        if isinstance(sample, Labeled):
            raise TypeError("a sample with a label has no answer to render: see `render_whole`")
        if isinstance(sample, Completion) and self.is_plain:
            return [self._render_bare(sample)]
        if isinstance(sample, Preference):
            return [part for side in sample.sides() for part in self._render_chat(side)]
        return self._render_chat(self._as_conversation(sample))

    def _as_conversation(self, sample: Completion | Conversation | Rated) -> Conversation:
        if isinstance(sample, Rated):  # whatever `train_on` says: the others were not rated
            return choose_answers(sample.conversation, "last")
        if isinstance(sample, Completion):
            messages = (Message("user", sample.prompt), Message("assistant", sample.completion))
            return Conversation(messages, sample.origin)
        return choose_answers(sample, self.options.train_on)

    def _render_noted(self, sample: Conversation) -> tuple[list[Segment], frozenset[str]]:
        """The sequences of a conversation and what was said, without counting it."""
        before, self._said = self._said, set()
        segments = self._render_chat(sample)
        said, self._said = frozenset(self._said), before
        return segments, said

    def _make_skeletons(self) -> Skeletons | None:
        if self.watched is None:
            return None
        tokens = added_tokens(self.tokenizer.backend_tokenizer)
        return Skeletons(tokens, self._render_noted, self._render_watched)

    def _render_watched(self, sample: Conversation) -> tuple[list[Segment], frozenset[str]]:
        own, self.template = self.template, self.watched or self.template
        try:
            return self._render_noted(sample)
        finally:
            self.template = own

    def _render_chat(self, sample: Conversation) -> list[Segment]:
        return self._render_conversation(self._fit(self._guarded(sample)))

    def _guarded(self, sample: Conversation) -> Conversation:
        guarded = guard_sample(sample, self.specials)
        if guarded is not sample:
            self._said.add(SPECIAL_AS_TEXT)
        return guarded

    def _render_conversation(self, sample: Conversation) -> list[Segment]:
        messages = [self._as_dict(message) for message in sample.messages]
        tools: list[Any] = list(sample.tools)
        segments: list[Segment] = []
        text = ""
        for index, message in enumerate(sample.messages):
            if message.role != "assistant" or not message.weight:
                continue
            if index == 0:  # inference always has something to answer
                self._said.add(FIRST_ANSWER)
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
        full = self._apply(messages, tools=tools or None)
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
        prompt = self._start() + self._guard(sample.prompt)
        answer = self._guard(sample.completion) + str(self.tokenizer.eos_token)
        # A bare prompt may end anywhere: two spaces at its end are one token alone, and two with a
        # word behind them. So the edge is always kept.
        return [Span(prompt), Span(answer, 1.0, starts_token=True)]

    def _render_text(self, sample: Text) -> Segment:
        text = self._guard(sample.text)
        if self.options.infill is not None:
            share, tokens = self.options.infill
            text = as_infill(text, share, tokens)
        end = str(self.tokenizer.eos_token)
        return [Span(self._start()), Span(text + end, 1.0)]

    def _start(self) -> str:
        return str(self.tokenizer.bos_token) if self.traits.adds_bos else ""

    def _guard(self, text: str) -> str:
        guarded = guard_text(text, self.specials)
        if guarded != text:
            self._said.add(SPECIAL_AS_TEXT)
        return guarded

    def _fit(self, sample: Conversation) -> Conversation:
        """Writes as text what the template has no place for."""
        has_calls = any(m.tool_calls or m.role == "tool" for m in sample.messages)
        if has_calls and self.traits.call_arguments is None:
            self._said.add(CALLS_AS_TEXT)
            sample = spell_calls(sample)
        if sample.tools and not self.traits.shows_tools:
            self._said.add(TOOLS_AS_TEXT)
            sample = spell_schemas(sample, with_format=self.traits.call_arguments is None)
        if not self.traits.shows_reasoning and any(m.reasoning for m in sample.messages):
            self._said.add(REASONING_AS_TEXT)
            sample = spell_reasoning(sample)
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


def refusal(sample: Sample, error: Exception) -> Problem:
    """A template's refusal as a problem of the row."""
    return Problem(
        str(sample.origin),
        "data.template",
        f"the chat template's refusal: {error}",
        "messages that the model's chat template can render",
    )


def choose_answers(
    sample: Conversation, train_on: Literal["all", "last"] | Sequence[int]
) -> Conversation:
    """The conversation with only the chosen answers carrying loss."""
    if train_on == "all":
        return sample
    answers = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
    wanted = [-1] if train_on == "last" else [int(number) for number in train_on]
    chosen = {
        answers[number - 1 if number > 0 else number]
        for number in wanted
        if number and -len(answers) <= number <= len(answers)
    }
    messages = tuple(
        message if index in chosen or message.role != "assistant" else replace(message, weight=0.0)
        for index, message in enumerate(sample.messages)
    )
    return replace(sample, messages=messages)


def unroll(segment: Segment) -> list[tuple[str, Span]]:
    """Every answer of a sequence with all the text before it, as (prompt, answer) pairs."""
    pairs: list[tuple[str, Span]] = []
    text = ""
    for span in segment:
        if span.is_supervised:
            pairs.append((text, span))
        text += span.text
    return pairs
