"""Samples to tokens in batches: rendered here, encoded in a thread beside, in order."""

from __future__ import annotations

import gc
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from tunesmith.data.outlines import Outlines, Steps
from tunesmith.data.templates import Renderer, Segment
from tunesmith.data.templates.skeleton import CHECK_EVERY, Skeleton
from tunesmith.data.tokenize import Encoder, TokenSequence, weigh_prompts, whole_sequence
from tunesmith.errors import Problem
from tunesmith.types import Completion, Conversation, Labeled, Preference, Rated, Sample, Text

BATCH_SAMPLES = 1000
"""Samples per parallel encode call: enough to fill all cores."""

BATCH_CHARACTERS = 4 << 20
"""Or so much text, so that long documents do not pile up."""

Tokenized = list[TokenSequence] | Problem
"""The sequences of a sample (none if nothing in it carries loss), or what is wrong with it."""

Sourced = tuple[int, Sample | Problem]
"""A sample with the number of its source."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A text that is encoded whole; one that a template rendered has its special tokens already."""

    text: str
    is_rendered: bool


@dataclass(slots=True)
class Batch:
    """Samples on their way to tokens.

    Args:
        rows: the samples, problems among them.
        results: the tokens of each, by place.
        notes: what rendering had to say, and how often.
        outlines: samples with an outline: (place, outline, its steps, the sample's texts).
        segments: samples without one: (place, rendered sequences).
        labeled: samples with a label, which have no answer: (place, what is encoded).
    """

    rows: list[Sourced]
    results: dict[int, Tokenized] = field(default_factory=dict[int, Tokenized])
    notes: Counter[str] = field(default_factory=Counter[str])
    outlines: list[tuple[int, Skeleton, tuple[Steps, ...], list[str]]] = field(
        default_factory=list[tuple[int, Skeleton, tuple[Steps, ...], list[str]]]
    )
    segments: list[tuple[int, list[Segment]]] = field(
        default_factory=list[tuple[int, list[Segment]]]
    )

    labeled: list[tuple[int, Plain]] = field(default_factory=list["tuple[int, Plain]"])

    def __iter__(self) -> Iterator[tuple[int, Sample | Problem, Tokenized]]:
        """(source, sample, tokens), in order."""
        for index, (source, sample) in enumerate(self.rows):
            yield source, sample, self.results[index]


class Pipeline:
    """Renders and encodes samples with one renderer.

    While batches are encoded on other cores in Rust, the next one is read and rendered.

    Args:
        renderer: with the tokenizer.
        prompt_weight: loss weight of tokens that are no answer.
        is_large: whether a second of preparation for a faster tokenizer pays.
    """

    def __init__(
        self, renderer: Renderer, prompt_weight: float = 0.0, *, is_large: bool = False
    ) -> None:
        self.renderer = renderer
        self.prompt_weight = prompt_weight
        self.encoder = Encoder(renderer.tokenizer.backend_tokenizer)
        self.outlines = Outlines(self.encoder)
        if is_large:
            self.outlines.speed_up()

    def run(self, rows: Iterable[Sourced]) -> Iterator[Batch]:
        """Yields all samples with their tokens, in order; problems pass through.

        Raises:
            SkeletonMismatchError: a shortcut proved wrong; take it away and start again.
        """
        waiting: deque[Future[Batch]] = deque()
        num_threads = self._num_threads()
        with _paused_collector(), ThreadPoolExecutor(num_threads) as pool:
            for batch in _batches(rows):
                waiting.append(pool.submit(self._encode, self._render(batch)))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def tokens_of(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Tokenized]]:
        """Each of a few samples with its tokens, by the template itself."""
        self.renderer.skeletons = None
        for batch in self.run((0, sample) for sample in samples):
            for _, sample, tokens in batch:
                if not isinstance(sample, Problem):
                    yield sample, tokens

    def _num_threads(self) -> int:
        """Encoding by tiktoken takes the calling thread alone, by `tokenizers` all cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(cores or 1, 8) if self.outlines.byte_bpe else 1

    def _render(self, rows: list[Sourced]) -> Batch:
        batch = Batch(rows)
        before = Counter(self.renderer.notes)
        for index, (_, sample) in enumerate(rows):
            if isinstance(sample, Problem):
                batch.results[index] = sample
                continue
            if isinstance(sample, Labeled):
                self._take_labeled(batch, index, sample)
                continue
            found = self.renderer.find_skeleton(sample)
            steps = self.outlines.steps_of(*found) if found else None
            if found and steps is not None:
                batch.outlines.append((index, found[0], steps, found[1]))
                continue
            segments = found[0].fill(found[1]) if found else self.renderer.render(sample)
            if isinstance(segments, Problem):
                batch.results[index] = segments
            else:
                batch.segments.append((index, segments))
        batch.notes = self.renderer.notes - before
        return batch

    def _take_labeled(self, batch: Batch, index: int, sample: Labeled) -> None:
        content = sample.content
        if isinstance(content, Text):
            batch.labeled.append((index, Plain(content.text, is_rendered=False)))
            return
        rendered = self.renderer.render_whole(content)
        if isinstance(rendered, Problem):
            batch.results[index] = rendered
        else:
            batch.labeled.append((index, Plain(rendered, is_rendered=True)))

    def _encode(self, batch: Batch) -> Batch:
        for is_rendered in (True, False):
            own = [
                (n, plain.text) for n, plain in batch.labeled if plain.is_rendered is is_rendered
            ]
            encoded = self.encoder.encode_whole([t for _, t in own], is_rendered=is_rendered)
            batch.results |= zip((n for n, _ in own), map(whole_sequence, encoded), strict=True)
        whole = self.encoder.encode([item for _, item in batch.segments], self.prompt_weight)
        for (index, _), sequences in zip(batch.segments, whole, strict=True):
            batch.results[index] = sequences
        outlines = self.outlines
        encoded = iter(outlines.encode_texts([t for *_, own in batch.outlines for t in own]))
        for number, (index, skeleton, steps, own) in enumerate(batch.outlines):
            built = outlines.build(steps, list(islice(encoded, len(own))))
            if number % CHECK_EVERY == 0:
                outlines.check(skeleton, own, built)
            if self.prompt_weight:
                built = weigh_prompts(built, self.prompt_weight)
            batch.results[index] = built
        return batch


@contextmanager
def _paused_collector() -> Generator[None]:
    """Python's collector looks at every living row again and again; rows have no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _batches(rows: Iterable[Sourced]) -> Iterator[list[Sourced]]:
    batch: list[Sourced] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += num_characters(row[1])
        if len(batch) >= BATCH_SAMPLES or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_characters(sample: Sample | Problem) -> int:
    """About how much text a sample has."""
    match sample:
        case Text():
            return len(sample.text)
        case Completion():
            return len(sample.prompt) + len(sample.completion)
        case Conversation():
            return sum(len(message.content or "") for message in sample.messages)
        case Rated():
            return num_characters(sample.conversation)
        case Labeled():
            return num_characters(sample.content)
        case Preference():
            return sum(num_characters(side) for side in sample.sides())
        case _:
            return 0
