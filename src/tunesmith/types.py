"""Canonical samples, rendered spans, packed batches and the protocols between the layers.

Shape letters: T tokens of a packed batch, N supervised rows of it, S sequences of it, G samples,
K sequences of each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import torch

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

T = TypeVar("T")

Role = Literal["system", "user", "assistant", "tool"]


# Samples: what a row of any format becomes


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


# Batches


@dataclass(frozen=True)
class Segments:
    """The segment table of a packed batch, as host integers.

    A segment may continue an earlier one, its parent: it sees the tokens of the parent, of the
    parent's parent and so on, and its positions go on from there. So a prefix that many sequences
    share is there once; a sequence is a segment without children, after all its ancestors. A parent
    may also be a whole sequence itself: then another one goes on from it.

    Args:
        lengths: tokens of each segment.
        parents: for each segment the index of an earlier one, or -1; empty if none has a parent.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment, and one past the last token of all."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment, without its ancestors."""
        return max(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each segment's first token: the tokens of all its ancestors."""
        offsets: list[int] = []
        for parent in self.parents or [-1] * len(self.lengths):
            offsets.append(0 if parent < 0 else offsets[parent] + self.lengths[parent])
        return tuple(offsets)

    @cached_property
    def reach(self) -> int:
        """Tokens of the longest segment with its ancestors."""
        return max(map(sum, zip(self.offsets, self.lengths, strict=True)))

    def ancestors(self, segment: int) -> tuple[int, ...]:
        """The segments before a segment, the first one first."""
        found: list[int] = []
        while self.parents and (segment := self.parents[segment]) >= 0:
            found.append(segment)
        return tuple(reversed(found))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbours of equal length as (first token, number of segments, length)."""
        runs: list[tuple[int, int, int]] = []
        for start, length in zip(self.starts, self.lengths, strict=False):
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
        return tuple(runs)

    @cached_property
    def memo(self) -> dict[Hashable, object]:
        """What others derive from the table and keep as long as it lives."""
        return {}


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end without padding, and the list of what is supervised.

    Row `row_N[i]` of the hidden states predicts `target_N[i]` with loss weight `weight_N[i]`, for
    sample `sample_N[i]`. A row that ends a shared prefix predicts the first token of each child, so
    it stands there more than once.

    Args:
        sequence_N: for each supervised row the number of its sequence in this batch.
        group_GK: the K sequences of each of G samples, by these numbers, in the sample's own order
            (chosen, rejected); only where an objective compares them.
        last_S: the row of each sequence's last token; a row of its own, even where sequences are
            equal.
        label_G: 1 where a sample is rated good, 0 where bad; of rated samples only.
        num_tokens: tokens of all sequences, each counted whole: the work that was asked for.
            Shared prefixes make the rows that are computed fewer, the tail makes them more.
        loss_weight: what the loss of this batch is divided by, were it alone: the supervised
            weight, or the samples where the objective counts these.
        columns_N: further numbers of each supervised row, by names that an objective knows.
    """

    ids_T: torch.Tensor
    position_T: torch.Tensor
    segments: Segments
    row_N: torch.Tensor
    target_N: torch.Tensor
    weight_N: torch.Tensor
    sample_N: torch.Tensor
    sequence_N: torch.Tensor
    last_S: torch.Tensor
    group_GK: torch.Tensor
    label_G: torch.Tensor
    num_tokens: int
    loss_weight: float
    columns_N: Mapping[str, torch.Tensor] = field(default_factory=dict[str, Any])

    @property
    def num_stored_tokens(self) -> int:
        """Rows that are computed: a shared prefix counts once, and a tail of padding counts."""
        return int(self.ids_T.numel())

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on another device."""
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            position_T=self.position_T.to(device, non_blocking=True),
            row_N=self.row_N.to(device, non_blocking=True),
            target_N=self.target_N.to(device, non_blocking=True),
            weight_N=self.weight_N.to(device, non_blocking=True),
            sample_N=self.sample_N.to(device, non_blocking=True),
            sequence_N=self.sequence_N.to(device, non_blocking=True),
            last_S=self.last_S.to(device, non_blocking=True),
            group_GK=self.group_GK.to(device, non_blocking=True),
            label_G=self.label_G.to(device, non_blocking=True),
            columns_N={
                name: column.to(device, non_blocking=True)
                for name, column in self.columns_N.items()
            },
        )


@dataclass(frozen=True)
class GlobalBatch:
    """All micro-batches of one optimizer step, with the weight that the loss is divided by.

    `num_tokens` and `num_stored_tokens` are the sums of those of the micro-batches.
    """

    epoch: int
    sample_ids: tuple[int, ...]
    micro_batches: tuple[PackedBatch, ...]
    supervised_weight: float
    num_supervised: int
    num_tokens: int

    @property
    def num_stored_tokens(self) -> int:
        """Rows that are computed in this step."""
        return sum(batch.num_stored_tokens for batch in self.micro_batches)


# Events


EventKind = Literal[
    "start", "resume", "step", "evaluation", "checkpoint", "skip", "rollback", "warning", "done"
]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run; `events.jsonl` holds one a line."""

    kind: EventKind
    step: int
    time: float
    data: Mapping[str, Json] = field(default_factory=dict[str, Json])


class Listener(Protocol):
    """Anything that follows the event stream: the console, plots, trackers."""

    def __call__(self, event: Event) -> None:
        """Takes one event, in order."""
        ...


# Progress of work that is not a training step: reading, tokenizing, converting


class Reporter(Protocol):
    """Shows a person what long work is going on; silent by default."""

    def note(self, text: str) -> None:
        """Says one line."""
        ...

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes the items on, showing how many went by."""
        ...

    def measure(
        self, label: str, items: Iterable[T], total: int, position: Callable[[], int]
    ) -> Iterator[T]:
        """Passes the items on, showing how many of `total` bytes `position` has reached."""
        ...

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Shows that something without a countable length goes on."""
        ...


class SilentReporter:
    """The Reporter for programs: says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def track(self, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """Passes the items on."""
        return iter(items)

    def measure(
        self, label: str, items: Iterable[T], total: int, position: Callable[[], int]
    ) -> Iterator[T]:
        """Passes the items on."""
        return iter(items)

    def waiting(self, label: str) -> AbstractContextManager[object]:
        """Shows nothing."""
        return nullcontext()


# Tokenizers: data and model never see each other; they meet here


class Encoding(Protocol):
    """Token ids of one text with the character range each came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class BackendTokenizer(Protocol):
    """The `tokenizers` object inside a fast tokenizer."""

    encode_special_tokens: bool
    model: Any

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """Encodes many texts on all cores."""
        ...

    def encode_batch_fast(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """The same without offsets."""
        ...

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        ...

    def from_str(self, json: str) -> BackendTokenizer:
        """Another tokenizer, from JSON."""
        ...

    def no_truncation(self) -> None:
        """Stops cutting texts off."""
        ...

    def no_padding(self) -> None:
        """Stops filling texts up."""
        ...

    def to_str(self) -> str:
        """The whole tokenizer as JSON."""
        ...


class Tokenizer(Protocol):
    """What tunesmith needs of a transformers tokenizer."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any
    special_tokens_map: Any
    bos_token: Any

    @property
    def backend_tokenizer(self) -> BackendTokenizer:
        """The fast tokenizer underneath."""
        ...

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Renders messages through the chat template."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids by token text, added tokens included."""
        ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of token texts."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Token texts of ids."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Text of ids."""
        ...
