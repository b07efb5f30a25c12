"""Canonical samples: what a row of any format becomes; and the spans they are rendered into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from tunesmith.types.json import Json

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample came from; the line counts from 1, in a workbook it is the row of a sheet."""

    path: str
    line: int
    sheet: str | None = None

    def __str__(self) -> str:
        return self.cell("A") if self.sheet else f"{self.path}:{self.line}"

    def cell(self, letter: str) -> str:
        """The place of one cell of a workbook's row, e.g. `book.xlsx:Sheet1!C7`."""
        return f"{self.path}:{self.sheet}!{letter}{self.line}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call; the arguments stay the JSON text that the data had."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; weight 0 keeps an assistant message out of the loss."""

    role: Role
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    name: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with the tools the assistant may call (OpenAI's function objects)."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Json], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain prompt and its continuation."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text, all of it to be learned (continued pretraining)."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse continuation, each ending in an assistant message."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Json], ...] = ()

    def sides(self) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected conversation; only what follows the prompt carries loss."""
        prompt = tuple(replace(message, weight=0.0) for message in self.prompt)
        chosen, rejected = (
            Conversation((*prompt, *answer), self.origin, self.tools)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


@dataclass(frozen=True, slots=True)
class Rated:
    """A conversation whose last answer was found good or bad (KTO)."""

    conversation: Conversation
    is_good: bool

    @property
    def origin(self) -> Origin:
        """Where it came from."""
        return self.conversation.origin


@dataclass(frozen=True, slots=True)
class Labeled:
    """A text or a conversation and the class it belongs to."""

    content: Conversation | Text
    label: str

    @property
    def origin(self) -> Origin:
        """Where it came from."""
        return self.content.origin


Sample: TypeAlias = Conversation | Completion | Text | Preference | Rated | Labeled


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of rendered text; a positive weight makes its tokens carry loss.

    `starts_token` asks that no token reach over its start: it is encoded apart from what precedes.
    """

    text: str
    weight: float = 0.0
    starts_token: bool = False

    @property
    def is_supervised(self) -> bool:
        """Whether the tokens of this span carry loss."""
        return self.weight > 0.0
