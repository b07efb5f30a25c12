"""Rendered spans to token ids; loss weights come from the spans, never from searching ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.data.templates import Segment, unroll
from tunesmith.types import BackendTokenizer, Encoding

Run = tuple[int, int, float]
"""Supervised tokens as (first, how many, weight)."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids of one sequence with its supervised runs."""

    ids: npt.NDArray[np.int32]
    runs: tuple[Run, ...]


def encode_samples(
    backend: BackendTokenizer, samples: Sequence[list[Segment]]
) -> list[list[TokenSequence]]:
    """Encodes the sequences of many samples in one parallel call.

    Each text is encoded whole, as inference encodes its prompt. Where a token would reach over
    the edge of an answer, that sequence's answers become sequences of their own, prompt and answer
    encoded apart: the prompt's tokens are those of inference in every case.
    """
    flat = [segment for segments in samples for segment in segments]
    texts = ["".join(span.text for span in segment) for segment in flat]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    encoded: list[list[TokenSequence] | None] = []
    for segment, encoding in zip(flat, encodings, strict=True):
        runs = find_runs(segment, encoding)
        encoded.append(None if runs is None else [_trim(encoding.ids, runs)])
    split = [segment for segment, done in zip(flat, encoded, strict=True) if done is None]
    apart = iter(_encode_apart(backend, split))
    complete = iter([next(apart) if done is None else done for done in encoded])
    return [[item for _ in segments for item in next(complete)] for segments in samples]


def find_runs(segment: Segment, encoding: Encoding) -> tuple[Run, ...] | None:
    """The supervised tokens of a whole encoded text; None if a token reaches over an edge."""
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    runs: list[Run] = []
    at = 0
    for span in segment:
        start, stop = at, at + len(span.text)
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


def _encode_apart(
    backend: BackendTokenizer, segments: Sequence[Segment]
) -> list[list[TokenSequence]]:
    pairs = [unroll(segment) for segment in segments]
    texts = [text for group in pairs for prompt, answer in group for text in (prompt, answer.text)]
    encodings = iter(backend.encode_batch(texts, add_special_tokens=False) if texts else [])
    result: list[list[TokenSequence]] = []
    for group in pairs:
        sequences: list[TokenSequence] = []
        for _, answer in group:
            prompt_ids: list[int] = next(encodings).ids
            answer_ids: list[int] = next(encodings).ids
            run = (len(prompt_ids), len(answer_ids), answer.weight)
            sequences.append(_trim(prompt_ids + answer_ids, (run,)))
        result.append(sequences)
    return result


def _trim(ids: list[int], runs: tuple[Run, ...]) -> TokenSequence:
    """Drops what follows the last supervised token: it would be computed for nothing."""
    stop = runs[-1][0] + runs[-1][1] if runs else len(ids)
    return TokenSequence(np.asarray(ids[:stop], dtype=np.int32), runs)
