"""Looks at the texts of one sample."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.data.check.chinese import script_mix
from tunesmith.data.check.mojibake import find_mojibake
from tunesmith.data.check.secrets import find_secrets
from tunesmith.data.check.special_tokens import find_special_tokens
from tunesmith.data.check.truncation import looks_truncated
from tunesmith.data.check.width import mixed_widths
from tunesmith.errors import Problem
from tunesmith.types import (
    Completion,
    Conversation,
    Labeled,
    Message,
    Preference,
    Rated,
    Sample,
    Text,
)

MAX_CHARACTERS = 20_000
"""Of a long text so much is looked at."""

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w ]{0,30}\}\}|<(?:insert|your)[ _][\w ]{1,30}>", re.I)

SPOKEN_ROLES = {"user": "question", "assistant": "answer", "system": "system message"}
SPOKEN_KINDS = ("question", "answer", "text", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class Texts:
    """A sample's texts: (what it is, the text), the last prompt, and the answers."""

    parts: list[tuple[str, str]]
    prompt: str
    answers: list[str]

    @property
    def whole(self) -> str:
        """All texts together; system messages stand for themselves by a hash.

        Rows that share a long system message are not alike for that.
        """
        return "\n".join(
            _hashed(text) if kind == SPOKEN_ROLES["system"] else text for kind, text in self.parts
        )

    @property
    def spoken(self) -> str:
        """The texts that tell the language."""
        return "\n".join(text for kind, text in self.parts if kind in SPOKEN_KINDS)


def _hashed(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def texts_of(sample: Sample) -> Texts:
    """Takes a sample apart."""
    match sample:
        case Text():
            return Texts([("text", sample.text)], "", [])
        case Completion():
            parts = [("prompt", sample.prompt), ("completion", sample.completion)]
            return Texts(parts, sample.prompt, [sample.completion])
        case Preference():
            prompt = [part for message in sample.prompt for part in _parts(message)]
            chosen = [part for message in sample.chosen for part in _parts(message)]
            rejected = [part for message in sample.rejected for part in _parts(message)]
            answers = [message.content or "" for message in sample.chosen[-1:]]
            return Texts(prompt + chosen + rejected, _question(sample.prompt), answers)
        case Rated():
            inner = texts_of(sample.conversation)
            # One answer rated both ways is a contradiction, not a duplicate.
            rating = ("rating", "good" if sample.is_good else "bad")
            return Texts([*inner.parts, rating], inner.prompt, inner.answers)
        case Labeled():
            inner = texts_of(sample.content)
            # One text under two labels is a contradiction, not a duplicate.
            return Texts([*inner.parts, ("label", sample.label)], inner.prompt, [])
        case Conversation():
            parts = [part for message in sample.messages for part in _parts(message)]
            answers = [
                message.content
                for message in sample.messages
                if message.role == "assistant" and message.content and message.weight
            ]
            return Texts(parts, _question(sample.messages), answers)


def _parts(message: Message) -> list[tuple[str, str]]:
    kind = SPOKEN_ROLES.get(message.role, "tool result")
    parts = [(kind, message.content)] if message.content else []
    if message.reasoning:
        parts.append(("reasoning", message.reasoning))
    return parts + [("tool call", f"{call.name}({call.arguments})") for call in message.tool_calls]


def _question(messages: tuple[Message, ...]) -> str:
    return next((m.content or "" for m in reversed(messages) if m.role == "user"), "")


def look_at(sample: Sample, texts: Texts, specials: frozenset[str]) -> list[Problem]:
    """Everything worth saying about the texts of one sample, each code once."""
    first: dict[str, Problem] = {}
    for problem in _look_at_all(sample, texts, specials):
        first.setdefault(problem.code, problem)
    return list(first.values())


def _look_at_all(sample: Sample, texts: Texts, specials: frozenset[str]) -> Iterator[Problem]:
    where = str(sample.origin)
    for kind, text in texts.parts:
        yield from _look_at_text(where, kind, text[:MAX_CHARACTERS], specials)
    for answer in texts.answers:
        reason = looks_truncated(answer)
        if reason:
            found = f"an answer that seems cut off ({reason}): ...{answer[-30:]!r}"
            yield Problem(where, "data.truncated-answer", found, "a whole answer")
    yield from _look_at_turns(where, sample)


def _look_at_text(where: str, kind: str, text: str, specials: frozenset[str]) -> Iterator[Problem]:
    broken = find_mojibake(text)
    if broken:
        found = f"{broken[:20]!r} in the {kind}"
        yield Problem(where, "data.mojibake", found, "readable text")
    if "<" in text or "[" in text:
        own, foreign = find_special_tokens(text, specials)
        if own:
            found = f"{', '.join(own[:5])} in the {kind}"
            yield Problem(where, "data.special-token", found, "plain text")
        if foreign:
            found = f"{', '.join(foreign[:5])} in the {kind}"
            yield Problem(where, "data.foreign-token", found, "plain text")
    mixed = script_mix(text)
    if mixed:
        yield Problem(where, "data.mixed-script", f"{mixed} in the {kind}", "one script")
    width = mixed_widths(text)
    if width:
        yield Problem(where, "data.mixed-width", f"{width} in the {kind}", "one width")
    for name, excerpt in find_secrets(text)[:1]:
        yield Problem(where, "data.secret", f"{name} {excerpt} in the {kind}", "nothing secret")
    placeholder = PLACEHOLDER.search(text)
    if placeholder:
        found = f"{placeholder[0]} in the {kind}"
        yield Problem(where, "data.placeholder", found, "the text that belongs there")


def _look_at_turns(where: str, sample: Sample) -> Iterator[Problem]:
    if isinstance(sample, Rated):
        sample = sample.conversation
    if isinstance(sample, Completion) and not sample.prompt.strip():
        yield Problem(where, "data.empty-prompt", "an empty prompt", "a prompt, or raw text")
    if not isinstance(sample, Conversation):
        return
    roles = [message.role for message in sample.messages]
    if roles[-1] != "assistant":
        found = f"{roles[-1]} as the last message"
        yield Problem(where, "data.unanswered-end", found, "an answer at the end")
    if "user" not in roles[: roles.index("assistant")]:
        yield Problem(where, "data.no-user", "an answer at the start", "a question before it")
    for message in sample.messages:
        if message.role == "user" and not (message.content or "").strip():
            yield Problem(where, "data.empty-prompt", "an empty question", "a question")
            return
