"""Rendered spans to token ids; loss weights come from the spans, never from searching ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken

from tunesmith.data.templates import Segment, unroll
from tunesmith.data.templates.guard import GUARD
from tunesmith.types import BackendTokenizer, Encoding, Span

Run = tuple[int, int, float]
"""Supervised tokens as (first, how many, weight)."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids of one sequence with its supervised runs."""

    ids: npt.NDArray[np.int32]
    runs: tuple[Run, ...]

    def same_as(self, other: TokenSequence) -> bool:
        """Whether tokens and runs are equal."""
        return self.runs == other.runs and np.array_equal(self.ids, other.ids)


class Encoder:
    """Encodes rendered samples with one tokenizer."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self.backend = backend
        self._as_text: BackendTokenizer | None = None
        self._tokens = _pattern_of_tokens(backend)

    def encode(
        self, samples: Sequence[list[Segment]], prompt_weight: float = 0.0
    ) -> list[list[TokenSequence]]:
        """Encodes the sequences of many samples in one parallel call.

        Each text is encoded whole, as inference encodes its prompt. Where a token would reach over
        the edge of an answer, that sequence's answers become sequences of their own, prompt and
        answer encoded apart: the prompt's tokens are those of inference in every case.

        Args:
            samples: the rendered sequences of each sample.
            prompt_weight: loss weight of all tokens that are no answer.
        """
        flat = [segment for segments in samples for segment in segments]
        texts = ["".join(span.text for span in segment) for segment in flat]
        encoded: list[list[TokenSequence] | None] = []
        for segment, encoding in zip(flat, self.encode_texts(texts), strict=True):
            runs = find_runs(segment, encoding)
            encoded.append(None if runs is None else [trimmed(as_ids(encoding.ids), runs)])
        split = [segment for segment, done in zip(flat, encoded, strict=True) if done is None]
        apart = iter(self._encode_apart(split))
        complete = iter([next(apart) if done is None else done for done in encoded])
        result = [[item for _ in segments for item in next(complete)] for segments in samples]
        return [weigh_prompts(item, prompt_weight) for item in result] if prompt_weight else result

    def encode_texts(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes texts; what a guard marks is encoded as plain text."""
        if not any(GUARD in text for text in texts):
            return self.backend.encode_batch(list(texts), add_special_tokens=False)
        plain = [text for text in texts if GUARD not in text]
        encodings = iter(self.backend.encode_batch(plain, add_special_tokens=False))
        return [self._encode_guarded(t) if GUARD in t else next(encodings) for t in texts]

    def encode_whole(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """The ids of whole texts.

        Args:
            texts: plain ones, which get the special tokens that the tokenizer puts around any
                text, or rendered ones, which have theirs.
            is_rendered: which of the two they are.
        """
        if is_rendered:
            return [encoding.ids for encoding in self.encode_texts(texts)]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=True)
        return [encoding.ids for encoding in encodings]

    def _encode_guarded(self, text: str) -> Encoding:
        whole = PlainEncoding([], [])
        stop = 0
        for token in [*self._tokens.finditer(text), None]:
            start = token.start() if token else len(text)
            between = text[stop:start].replace(GUARD, "")
            if between and not whole.ids:
                whole.add(_encode_one(self._plain(), between))
            elif between:
                # Some tokenizers put a space before a text's first word only: this is not first.
                whole.add(_encode_one(self._plain(), GUARD + between), skipped=1)
            if token:
                whole.add(_encode_one(self.backend, token[0]), length=len(token[0]))
                stop = token.end()
        return whole

    def _plain(self) -> BackendTokenizer:
        """The same tokenizer, for which all added tokens are text, but the guard is a token."""
        if self._as_text is None:
            tree = json.loads(self.backend.to_str())
            tree["added_tokens"] = []
            as_text: Any = self.backend.from_str(json.dumps(tree, ensure_ascii=False))
            as_text.add_tokens([AddedToken(GUARD, normalized=False, special=False)])
            self._as_text = cast("BackendTokenizer", as_text)
        return self._as_text

    def _encode_apart(self, segments: Sequence[Segment]) -> list[list[TokenSequence]]:
        pairs = [unroll(segment) for segment in segments]
        texts = [
            text for group in pairs for prompt, answer in group for text in (prompt, answer.text)
        ]
        encodings = iter(self.encode_texts(texts))
        result: list[list[TokenSequence]] = []
        for group in pairs:
            sequences: list[TokenSequence] = []
            for _, answer in group:
                prompt_ids: list[int] = next(encodings).ids
                answer_ids: list[int] = next(encodings).ids
                run = (len(prompt_ids), len(answer_ids), answer.weight)
                sequences.append(trimmed(as_ids(prompt_ids + answer_ids), (run,)))
            result.append(sequences)
        return result


@dataclass(slots=True)
class PlainEncoding:
    """An Encoding put together from several."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    length: int = 0
    """Characters so far."""

    def add(self, part: Encoding, *, skipped: int = 0, length: int | None = None) -> None:
        """Goes on with a part, without its first `skipped` tokens of one character each.

        Args:
            part: the tokens of the text that follows.
            skipped: how many to leave out.
            length: characters of that text; by default as far as its last token reaches.
        """
        at = self.length - skipped
        self.ids += part.ids[skipped:]
        self.offsets += [(at + first, at + last) for first, last in part.offsets[skipped:]]
        self.length = at + (part.offsets[-1][1] if length is None else length)


def _encode_one(backend: BackendTokenizer, text: str) -> Encoding:
    return backend.encode_batch([text], add_special_tokens=False)[0]


def _pattern_of_tokens(backend: BackendTokenizer) -> re.Pattern[str]:
    """Finds added tokens, the longest first, with the white space that some take along."""
    tokens = sorted(
        backend.get_added_tokens_decoder().values(), key=lambda t: len(t.content), reverse=True
    )
    return re.compile(
        "|".join(
            (r"\s*" if token.lstrip else "")
            + re.escape(token.content)
            + (r"\s*" if token.rstrip else "")
            for token in tokens
        )
        or "(?!)"
    )


def find_runs(segment: Segment, encoding: Encoding) -> tuple[Run, ...] | None:
    """The supervised tokens of a whole encoded text; None if a token reaches over an edge."""
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    runs: list[Run] = []
    at = 0
    for span in segment:
        start, stop = at, at + _length(span)
        at = stop
        if not span.is_supervised or start == stop:
            continue
        first, last = np.searchsorted(starts, [start, stop])
        # Text before an edge must end in a token that ends there: offsets may leave out spaces
        # (trim_offsets), so a start at the edge alone does not prove a clean cut.
        is_clean = (
            not span.starts_token
            and first < last
            and starts[first] == start
            and ends[last - 1] == stop
            and (first == 0 or ends[first - 1] == start)
        )
        if not is_clean:
            return None
        runs.append((int(first), int(last - first), span.weight))
    return tuple(runs)


def _length(span: Span) -> int:
    return len(span.text) - span.text.count(GUARD)


def trimmed(ids: npt.NDArray[np.int32], runs: tuple[Run, ...]) -> TokenSequence:
    """Drops what follows the last supervised token: it would be computed for nothing."""
    return TokenSequence(ids[: runs[-1][0] + runs[-1][1]] if runs else ids, runs)


def whole_sequence(ids: Sequence[int]) -> list[TokenSequence]:
    """One sequence whose tokens all count, so that it may be cut anywhere; none of no tokens."""
    return [TokenSequence(as_ids(ids), ((0, len(ids), 1.0),))] if ids else []


def as_ids(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """Token ids as an array."""
    return np.asarray(ids, dtype=np.int32)


def weigh_prompts(sequences: Sequence[TokenSequence], weight: float) -> list[TokenSequence]:
    """Gives the tokens between answers a weight of their own.

    Where a sample has several sequences, a later one repeats the start of the one before: what
    both have in common is weighed once.
    """
    weighed: list[TokenSequence] = []
    before: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
    for sequence in sequences:
        shared = min(len(before), len(sequence.ids))
        differs = np.flatnonzero(before[:shared] != sequence.ids[:shared])
        at = int(differs[0]) if len(differs) else shared
        runs: list[Run] = []
        for first, length, run_weight in sequence.runs:
            if first > at:
                runs.append((at, first - at, weight))
            runs.append((first, length, run_weight))
            at = first + length
        weighed.append(TokenSequence(sequence.ids, tuple(runs)))
        before = sequence.ids
    return weighed
