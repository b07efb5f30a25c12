"""Many answers at once by transformers' layers: as one ends, a waiting prompt takes its place.

Prompts go longest first, so that most memory is needed at once and not at the end. Each answer has
random numbers of its own; what others are under way changes no more than rounding does.

Shape letters: B answers under way, V vocabulary.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.errors import OutOfMemoryError
from tunesmith.infer.answers import Answer, Answering, Asked
from tunesmith.infer.sample import Drawing, draw_tokens
from tunesmith.infer.slots import (
    ROUND_TOKENS,
    SLOT_ATTENTION,
    Slots,
    attend_slots,
    read_prompts,
    read_tokens,
)
from tunesmith.infer.stop_text import StopTexts, pieces
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import Tokenizer

MOST_ROWS = {"cuda": 256, "cpu": 64}
"""Answers at once, where memory suffices. On a CPU more of them took longer in proportion."""

PREFILL_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens of prompts that are read at once."""

REFILL_SHARE = 8
"""Prompts join when this part of the slots is free: few at a time are read slowly."""


@dataclass
class BatchEngine:
    """Answers with a model in this process.

    Args:
        model: a causal language model in eval mode that `slots` fits (see `slot_error`); while
            answers are taken, its attention is set to that of the slots.
        tokenizer: of the model.
        stop_ids: tokens that end an answer.
        free_bytes: tells the memory that there is for keys and values.
        most_rows: answers at once.
    """

    model: Any
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    free_bytes: Callable[[], int]
    most_rows: int = 0

    def answer(
        self, questions: Sequence[Asked], answering: Answering
    ) -> Iterator[tuple[int, Answer]]:
        """See `infer.answers.Engine`."""
        stops = StopTexts(self.tokenizer, answering.stop)
        drawing = Drawing(
            self.stop_ids,
            answering.max_new_tokens,
            answering.temperature,
            answering.top_k,
            answering.top_p,
        )
        context = context_tokens(self.model)
        rows = [_row(n, each, answering, context) for n, each in enumerate(questions)]
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        kind = self.model.device.type
        work = _Work(
            self.model,
            drawing,
            stops,
            self.most_rows or MOST_ROWS.get(kind, MOST_ROWS["cpu"]),
            PREFILL_TOKENS.get(kind, PREFILL_TOKENS["cpu"]),
            self.free_bytes,
            has_logprobs=answering.has_logprobs,
        )
        with slot_attention(self.model):
            for row in work.run(waiting):
                yield row.number, answer_of(row, stops, self.stop_ids, answering)


@dataclass(eq=False)
class Row:
    """An answer that waits, is under way, or has ended.

    Args:
        number: of the question.
        prompt: its tokens.
        most: tokens of the answer.
        uniform: a number in [0, 1) for each of them; None where none is drawn.
    """

    number: int
    prompt: Sequence[int]
    most: int
    uniform: npt.NDArray[np.float64] | None
    ids: list[int] = field(default_factory=list[int])
    logp: list[float] = field(default_factory=list[float])
    is_complete: bool = False

    def take(self, token: int, logp: float, drawing: Drawing, stops: StopTexts) -> bool:
        """Takes the next token; whether it is the last one."""
        self.ids.append(token)
        self.logp.append(logp)
        self.is_complete = token in drawing.stop_ids or stops.have_come(self.ids)
        return self.is_complete or len(self.ids) == self.most

    def begin_anew(self) -> None:
        """Forgets the answer so far."""
        self.ids.clear()
        self.logp.clear()


def _row(number: int, asked: Asked, answering: Answering, context: int | None) -> Row:
    most = answering.max_new_tokens
    if context is not None:
        most = max(1, min(most, context - len(asked.ids)))
    uniform = None
    if answering.temperature > 0:
        uniform = row_numbers(answering.seed, asked.id, most)
    return Row(number, asked.ids, most, uniform)


def row_numbers(seed: int, row_id: str, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) for a row's tokens: the same on every machine.

    Args:
        seed: of the sampling.
        row_id: 16 hexadecimal digits.
        count: how many.
    """
    key = np.array([seed % 2**64, int(row_id, 16)], dtype=np.uint64)
    # numpy promises Philox's raw stream for all versions (NEP 19); 53 bits make a double.
    raw = np.random.Philox(key=key).random_raw(count) >> np.uint64(11)
    return raw.astype(np.float64) * 2.0**-53


def context_tokens(model: Any) -> int | None:
    """Tokens that a model can see; None if its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def answer_of(row: Row, stops: StopTexts, stop_ids: Sequence[int], answering: Answering) -> Answer:
    """An ended row's answer."""
    ends_with_token = row.ids[-1] in stop_ids
    pairs = None
    if answering.has_logprobs:
        pairs = tuple(zip(pieces(stops.tokenizer, row.ids), row.logp, strict=True))
    return Answer(
        stops.answer(row.ids[:-1] if ends_with_token else row.ids),
        "stop" if row.is_complete else "length",
        len(row.prompt),
        len(row.ids),
        pairs,
    )


@contextmanager
def slot_attention(model: Any) -> Generator[None]:
    """The model with the attention of slots."""
    from transformers import AttentionInterface

    AttentionInterface.register(SLOT_ATTENTION, attend_slots)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(SLOT_ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@dataclass
class _Work:
    """The answers under way: those in `rows` fill the first slots.

    Args:
        model: reads tokens.
        drawing: how tokens are drawn.
        stops: texts that end answers.
        most_rows: answers at once; halved for good where memory ends.
        prefill_tokens: of prompts read at once; halved with it.
        free_bytes: tells the memory for keys and values.
        has_logprobs: whether they are wanted.
    """

    model: Any
    drawing: Drawing
    stops: StopTexts
    most_rows: int
    prefill_tokens: int
    free_bytes: Callable[[], int]
    has_logprobs: bool
    rows: list[Row] = field(default_factory=list[Row])
    slots: Slots | None = None

    def run(self, waiting: deque[Row]) -> Iterator[Row]:
        """Yields rows as they end."""
        while waiting or self.rows:
            joining: list[Row] = []
            try:
                joining = self._next(waiting)
                ended = self._read_new(joining) if joining else self._read_on()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # The frames below hold tensors; these must be gone before another try.
                traceback.clear_frames(error.__traceback__)
                self._give_back(joining, waiting)
                continue
            yield from ended

    def _next(self, waiting: deque[Row]) -> list[Row]:
        """Takes the rows whose prompts are to be read now; none if it is not time to."""
        if not waiting:
            return []
        room = self._make_room(waiting[0]) - len(self.rows)
        if self.rows and room < max(1, (room + len(self.rows)) // REFILL_SHARE):
            return []
        taken: list[Row] = []
        tokens = 0
        while waiting and len(taken) < room:
            tokens += len(waiting[0].prompt)
            if taken and tokens > self.prefill_tokens:
                break
            taken.append(waiting.popleft())
        return taken

    def _make_room(self, row: Row) -> int:
        """Slots for rows like this one or shorter; there are more as rows get shorter."""
        needed = [len(each.prompt) + each.most for each in (row, *self.rows)]
        num_tokens = -(-max(needed) // ROUND_TOKENS) * ROUND_TOKENS
        if self.slots is None:
            self.slots = Slots(self._num_slots(num_tokens) + 1, num_tokens)
        elif 2 * num_tokens <= self.slots.num_tokens:
            before = self.slots.num_slots - 1
            more = min(self.most_rows, before * (self.slots.num_tokens // num_tokens))
            if more > before:
                self.slots.resized(more + 1, num_tokens)
        return min(self.slots.num_slots - 1, self.most_rows)

    def _num_slots(self, num_tokens: int) -> int:
        affordable = self.free_bytes() // (cache_bytes(self.model) * num_tokens)
        return max(1, min(self.most_rows, affordable - 1))

    @torch.inference_mode()
    def _read_new(self, joining: list[Row]) -> list[Row]:
        if self.slots is None:
            raise AssertionError("there are slots once rows join")
        prompts = [row.prompt for row in joining]
        logits_BV = read_prompts(self.model, self.slots, prompts, len(self.rows))
        first = len(self.rows)
        self.rows += joining
        return self._draw(first, logits_BV)

    @torch.inference_mode()
    def _read_on(self) -> list[Row]:
        if self.slots is None:
            raise AssertionError("there are slots while rows are under way")
        missing = min(_padded(len(self.rows)), self.slots.num_slots) - len(self.rows)
        ids = [row.ids[-1] for row in self.rows] + [0] * missing
        places = [len(row.prompt) + len(row.ids) - 1 for row in self.rows] + [0] * missing
        logits_BV = read_tokens(self.model, self.slots, ids, places)
        return self._draw(0, logits_BV[: len(self.rows)])

    def _draw(self, first: int, logits_BV: torch.Tensor) -> list[Row]:
        """Draws a token of each row from `first` on; those that end leave their slots."""
        rows = self.rows[first:]
        tokens, logps = self._drawn(rows, logits_BV)
        ended = [
            row
            for row, token, logp in zip(rows, tokens, logps, strict=True)
            if row.take(token, logp, self.drawing, self.stops)
        ]
        for row in ended:
            self._leave(row)
        return ended

    def _drawn(
        self, rows: Sequence[Row], logits_BV: torch.Tensor
    ) -> tuple[list[int], Sequence[float]]:
        if self.drawing.temperature <= 0 and not self.has_logprobs:
            return logits_BV.argmax(-1).tolist(), [0.0] * len(rows)
        numbers = [0.0 if row.uniform is None else row.uniform[len(row.ids)] for row in rows]
        uniform_B = torch.tensor(numbers, dtype=torch.float64).to(
            logits_BV.device, torch.float32 if logits_BV.device.type == "mps" else torch.float64
        )
        id_B, logp_B = draw_tokens(logits_BV, uniform_B, self.drawing)
        return id_B.tolist(), logp_B.tolist()

    def _leave(self, row: Row) -> None:
        """Frees a row's slot: the last row moves into it."""
        place, last = self.rows.index(row), self.rows[-1]
        if last is not row and self.slots is not None:
            self.slots.move(len(self.rows) - 1, place, len(last.prompt) + len(last.ids))
            self.rows[place] = last
        self.rows.pop()

    def _give_back(self, joining: list[Row], waiting: deque[Row]) -> None:
        """After the end of memory: all that was under way begins anew, half as many at once.

        Raises:
            OutOfMemoryError: one was alone already.
        """
        known = {id(row) for row in self.rows}
        tried = self.rows + [row for row in joining if id(row) not in known]
        if len(tried) <= 1:
            raise _too_large(tried)
        for row in sorted(tried, key=lambda row: len(row.prompt)):
            row.begin_anew()
            waiting.appendleft(row)
        self.rows, self.slots = [], None
        self.most_rows = len(tried) // 2
        self.prefill_tokens //= 2
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _too_large(rows: Sequence[Row]) -> OutOfMemoryError:
    size = f"a prompt of {len(rows[0].prompt):,}" if rows else "its prompt"
    most = rows[0].most if rows else 0
    return OutOfMemoryError(
        "memory.one-answer",
        "max_new_tokens",
        found=f"no memory for one answer of up to {most:,} tokens to {size}",
        expected="an answer that fits",
        try_="a smaller --max-new-tokens, shorter prompts, or another --engine",
    )


def _padded(count: int) -> int:
    """Rows of a step: few different numbers, because every new one costs libraries time."""
    if count > 8:
        return -(-count // 8) * 8
    return 1 << (count - 1).bit_length()


def cache_bytes(model: Any) -> int:
    """Of keys and values, for each token of an answer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
