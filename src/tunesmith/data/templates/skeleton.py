"""Renders conversations of the same outline once: what changes between them is only their texts.

Most rows of a file differ in nothing but what the messages say. Such an outline (roles, weights,
tools) is rendered with marks in the places of the texts, and every further conversation of it is
filled in. Meanwhile the template is watched (`watch.py`): a text goes this way only if it meets all
conditions under which the template cannot tell it from a mark. As a proof of the watch, each
outline must first render texts full of awkward characters just as the template itself does, and
every 512th conversation is rendered both ways; one difference ends the shortcut for the whole
template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.data.templates.guard import GUARD
from tunesmith.data.templates.watch import CLOSE, FIRST, OPEN, OpaqueError, mark, watching
from tunesmith.types import Conversation, Message, Span

Segment = list[Span]
Outline = tuple[object, ...]
Render = Callable[[Conversation], tuple[list[Segment], frozenset[str]]]
"""Renders a conversation and says what it noted."""

CHECK_EVERY = 512
"""Every so many conversations are rendered by the template as well."""

MAX_OUTLINES = 4096
"""More kinds of conversations than this are not worth keeping."""

AWKWARD = ('Aa"q"\\\'', "<b>&amp;</b>", "{x} {{ y }} %s", "zz\n\n  z\tz", "长，文。é😀", "w" * 3000)
"""Pieces of text that a template could treat in a way of its own."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What a template looks for in texts.

    Args:
        inside: pieces of text it searches.
        equal: whole texts it compares with.
        edges: characters it strips from the ends.
    """

    inside: frozenset[str]
    equal: frozenset[str]
    edges: frozenset[str]
    starts: tuple[str, ...]
    """What the searched pieces start with: most texts have none of these characters."""

    def passes(self, text: str) -> bool:
        """Whether the template cannot treat this text in a way of its own."""
        if not text or text[0].isspace() or text[-1].isspace() or text in self.equal:
            return False
        if text[0] in self.edges or text[-1] in self.edges:
            return False
        for start in self.starts:
            if start in text:
                return not any(piece in text for piece in self.inside)
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """A rendered outline: spans whose text is parts, a number standing for a message's text."""

    segments: tuple[tuple[tuple[tuple[str | int, ...], Span], ...], ...]
    said: frozenset[str]
    """What rendering had to say."""
    screen: Screen
    """Which texts it may be filled with."""

    def fill(self, texts: list[str]) -> list[Segment]:
        """The spans with these texts."""
        return [
            [
                replace(span, text="".join([p if isinstance(p, str) else texts[p] for p in parts]))
                for parts, span in segment
            ]
            for segment in self.segments
        ]


class SkeletonMismatchError(Exception):
    """A filled-in outline is not what the template renders: the shortcut may not be used."""


class Skeletons:
    """The outlines of one template, made when first met.

    Args:
        tokens: the tokenizer's added tokens; a text with one of them needs care.
        render: renders by the template.
        render_watched: renders by a `WatchedTemplate` of it.
    """

    def __init__(self, tokens: Collection[str], render: Render, render_watched: Render) -> None:
        # Rendering itself looks for these two, whatever the template does.
        self.tokens = frozenset(tokens) - {""} | {"<think>", GUARD}
        self.render = render
        self.render_watched = render_watched
        self.known: dict[Outline, Skeleton | None] = {}
        self.count = 0

    def find(self, sample: Conversation) -> tuple[Skeleton, list[str]] | None:
        """The sample's outline and its texts; None if it has to be rendered by the template.

        Raises:
            SkeletonMismatchError: a check failed.
        """
        texts: list[str] = []
        roles: list[object] = []
        for message in sample.messages:
            content = message.content
            if not content or message.tool_calls or message.reasoning or message.name:
                return None
            texts.append(content)
            roles.append((message.role, message.weight))
        tools = json.dumps(sample.tools) if sample.tools else ""
        skeleton = self._of((tuple(roles), tools), sample)
        if skeleton is None or not all(skeleton.screen.passes(text) for text in texts):
            return None
        self.count += 1
        if self.count % CHECK_EVERY == 1 and not self._agrees(skeleton, sample, texts):
            raise SkeletonMismatchError(str(sample.origin))
        return skeleton, texts

    def _of(self, outline: Outline, sample: Conversation) -> Skeleton | None:
        if outline not in self.known:
            if len(self.known) >= MAX_OUTLINES:
                return None
            # What the template refuses is not tried again, either.
            self.known[outline] = None
            self.known[outline] = self._make(sample)
        return self.known[outline]

    def _make(self, sample: Conversation) -> Skeleton | None:
        number = len(sample.messages)
        marked = _with_texts(sample, [mark(index) for index in range(number)])
        try:
            with watching() as asked:
                segments, said = self.render_watched(marked)
        except OpaqueError:
            return None
        inside = {piece for piece in asked.inside if not any(t in piece for t in self.tokens)}
        pieces = self.tokens | inside
        screen = Screen(
            pieces,
            frozenset(asked.equal),
            frozenset().union(*asked.edges),
            tuple(sorted({piece[0] for piece in pieces})),
        )
        parts = tuple(
            tuple((tuple(_split(span.text)), replace(span, text="")) for span in segment)
            for segment in segments
        )
        skeleton = Skeleton(parts, said, screen)
        awkward = "".join(piece for piece in AWKWARD if screen.passes(piece)) or "plain"
        texts = [f"{awkward}{index}" for index in range(number)]
        if not all(screen.passes(text) for text in texts):
            return None
        return skeleton if self._agrees(skeleton, _with_texts(sample, texts), texts) else None

    def _agrees(self, skeleton: Skeleton, sample: Conversation, texts: list[str]) -> bool:
        segments, said = self.render(sample)
        return skeleton.fill(texts) == segments and skeleton.said == said


def _with_texts(sample: Conversation, texts: list[str]) -> Conversation:
    messages: Iterator[Message] = (
        replace(message, content=text) for message, text in zip(sample.messages, texts, strict=True)
    )
    return replace(sample, messages=tuple(messages))


def _split(text: str) -> Iterator[str | int]:
    """Template text and the numbers of the marks in it."""
    first, *rest = text.split(OPEN)
    if first:
        yield first
    for piece in rest:
        number, _, literal = piece.partition(CLOSE)
        yield ord(number) - FIRST
        if literal:
            yield literal


def added_tokens(backend: Any) -> list[str]:
    """Texts of all added tokens, special or not."""
    return [token.content for token in backend.get_added_tokens_decoder().values()]
