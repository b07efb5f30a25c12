r"""Tokens of conversations by outline: the template's part is encoded once, the texts in bulk.

Between two special tokens a template writes little (`assistant\n`), so a text's tokens are the same
whether it is encoded alone or within the whole, unless a token reaches over its edges. Edges are
tried with the tokenizer itself; a text that fails goes the long way. Every 512th sample is encoded
both ways, and one difference ends the shortcut.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from operator import not_
from typing import Any

import numpy as np

from tunesmith.data.byte_bpe import ByteBpe, Ids, find_byte_bpe
from tunesmith.data.templates.skeleton import Skeleton, SkeletonMismatchError
from tunesmith.data.tokenize import Encoder, Run, TokenSequence, as_ids, trimmed
from tunesmith.types import BackendTokenizer

PROBE_CHARS = 24
"""So much of a text is looked at to see whether its first or last word stands alone."""

CONTINUATIONS = ("", "a", "s", "S", "ll", "1", " ", "\n\n", ".", "'", "中", "\u0301")
"""What may follow a first character; some regular expressions look that far."""


@dataclass(frozen=True, slots=True)
class Step:
    """One part of a sequence: the template's tokens, or the place of a message's text.

    `tail` is the template's text in front of the place since its last special token, `head` the
    text behind it up to the next one; both are empty where a special token stands at the edge.
    """

    ids: Ids
    slot: int
    weight: float
    tail: str = ""
    head: str = ""


Steps = tuple[Step, ...]


class Outlines:
    """The tokens of skeletons, made when first met."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.backend: BackendTokenizer = encoder.backend
        self.known: dict[Skeleton, tuple[Steps, ...] | None] = {}
        self.clean: dict[tuple[str, str], bool] = {}
        self.tree: dict[str, Any] = json.loads(self.backend.to_str())
        self.is_local = is_local(self.tree)
        tokens = self.backend.get_added_tokens_decoder().values()
        self.plain = [t.content for t in tokens if not (t.lstrip or t.rstrip or t.single_word)]
        self.tokens = re.compile(
            "|".join(re.escape(t) for t in sorted(self.plain, key=len, reverse=True)) or "(?!)"
        )
        self.byte_bpe: ByteBpe | None = None

    def speed_up(self) -> None:
        """Looks for a faster tokenizer of the same tokens; that takes a second."""
        self.byte_bpe = find_byte_bpe(self.backend, self.tree) if self.is_local else None

    def encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of texts without special tokens in them."""
        fast = self.byte_bpe
        if fast is None:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [as_ids(encoding.ids) for encoding in encodings]
        is_fast = [fast.can_encode(text) for text in texts]
        quick = iter(fast.encode(list(compress(texts, is_fast))))
        others = list(compress(texts, map(not_, is_fast)))
        slow = iter(self.backend.encode_batch_fast(others, add_special_tokens=False))
        return [next(quick) if fits else as_ids(next(slow).ids) for fits in is_fast]

    def steps_of(self, skeleton: Skeleton, texts: Sequence[str]) -> tuple[Steps, ...] | None:
        """The steps of a sample's sequences; None if it has to be encoded whole."""
        if not self.is_local:
            return None
        if skeleton not in self.known:
            self.known[skeleton] = self._make(skeleton)
        sequences = self.known[skeleton]
        if sequences is None:
            return None
        for steps in sequences:
            for step in steps:
                if step.slot >= 0 and not self._has_clean_edges(step, texts[step.slot]):
                    return None
        return sequences

    def build(
        self, sequences: tuple[Steps, ...], ids_of_texts: Sequence[Ids]
    ) -> list[TokenSequence]:
        """Puts the tokens of a sample together."""
        built: list[TokenSequence] = []
        for steps in sequences:
            pieces = [step.ids if step.slot < 0 else ids_of_texts[step.slot] for step in steps]
            runs: list[Run] = []
            at = 0
            for step, piece in zip(steps, pieces, strict=True):
                length = len(piece)
                if step.weight > 0 and length:
                    if runs and sum(runs[-1][:2]) == at and runs[-1][2] == step.weight:
                        first, before, _ = runs.pop()
                        runs.append((first, before + length, step.weight))
                    else:
                        runs.append((at, length, step.weight))
                at += length
            built.append(trimmed(np.concatenate(pieces), tuple(runs)))
        return built

    def check(self, skeleton: Skeleton, texts: list[str], built: Sequence[TokenSequence]) -> None:
        """Encodes a sample the long way.

        Raises:
            SkeletonMismatchError: the tokens differ.
        """
        whole = self.encoder.encode([skeleton.fill(texts)])[0]
        if len(whole) != len(built) or not all(
            left.same_as(right) for left, right in zip(whole, built, strict=True)
        ):
            raise SkeletonMismatchError(texts[-1][:60])

    def _make(self, skeleton: Skeleton) -> tuple[Steps, ...] | None:
        sequences: list[Steps] = []
        for segment in skeleton.segments:
            parts = [(part, span.weight) for pieces, span in segment for part in pieces]
            if any(span.starts_token for _, span in segment) or not _alternates(parts):
                return None
            steps: list[Step] = []
            for index, (part, weight) in enumerate(parts):
                if isinstance(part, str):
                    steps.append(Step(as_ids(self._ids(part)), -1, weight))
                else:
                    before = _fixed(parts[:index][::-1])[::-1]
                    steps.append(
                        Step(
                            as_ids([]),
                            part,
                            weight,
                            self._since_last_token("".join(before)),
                            self._to_next_token("".join(_fixed(parts[index + 1 :]))),
                        )
                    )
            sequences.append(tuple(steps))
        made = tuple(sequences)
        number = 1 + max((step.slot for steps in made for step in steps), default=-1)
        texts = ["Hello"] * number
        try:
            built = self.build(made, [as_ids(self._ids(text)) for text in texts])
            self.check(skeleton, texts, built)
        except SkeletonMismatchError:
            return None
        return made

    def _since_last_token(self, text: str) -> str:
        return text[max((found.end() for found in self.tokens.finditer(text)), default=0) :]

    def _to_next_token(self, text: str) -> str:
        found = self.tokens.search(text)
        return text[: found.start()] if found else text

    def _has_clean_edges(self, step: Step, text: str) -> bool:
        if unicodedata.combining(text[0]):
            return False
        if step.tail:
            key = (step.tail, text[0])
            if key not in self.clean:
                starts = [text[0] + more for more in (*CONTINUATIONS, text[0], text[1:PROBE_CHARS])]
                self.clean[key] = self._parts_alone(step.tail, starts)
            if not self.clean[key]:
                return False
        if not step.head:
            return True
        # Digits are cut in threes, counted from where their run begins.
        if text[-1].isnumeric() and step.head[0].isnumeric():
            return False
        return self._parts_alone(text[-PROBE_CHARS:], [step.head])

    def _parts_alone(self, left: str, rights: Sequence[str]) -> bool:
        """Whether a word ends between a text and each of those that may follow it.

        Equal tokens are no proof: `=` and a line end are two tokens, 16 `=` and a line end one.
        """
        texts = [left, *rights, *(left + right for right in rights)]
        before, *encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        at = len(before.ids)
        for alone, whole in zip(encodings[: len(rights)], encodings[len(rights) :], strict=True):
            if whole.ids != before.ids + alone.ids:
                return False
            if self.tree["model"]["merges"] and whole.word_ids[at - 1] == whole.word_ids[at]:
                return False
        return True

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode_batch([text], add_special_tokens=False)[0].ids


def _fixed(parts: Sequence[tuple[str | int, float]]) -> list[str]:
    """The template's texts at the start of a list of parts."""
    texts: list[str] = []
    for part, _ in parts:
        if not isinstance(part, str):
            break
        texts.append(part)
    return texts


def _alternates(parts: Sequence[tuple[str | int, float]]) -> bool:
    """Whether no two texts touch each other."""
    slots = [isinstance(part, int) for part, _ in parts]
    return not any(left and right for left, right in pairwise(slots))


def is_local(tree: dict[str, Any]) -> bool:
    """Whether a token lies within a word that a regular expression cuts out.

    Then what stands at a distance cannot change it. SentencePiece-like tokenizers have no such
    words, nor tokenizers that put a space in front of every text.

    Args:
        tree: what the tokenizer is made of.
    """
    if tree["model"]["type"] != "BPE":
        return False
    outer = tree.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = outer.get("pretokenizers", [outer])
    if any(step.get("add_prefix_space") for step in steps):
        return False
    if {step.get("type") for step in steps} - {"Split", "ByteLevel", "Digits"}:
        return False
    normalizer = tree.get("normalizer")
    is_plain = not normalizer or normalizer["type"] == "NFC" or normalizer.get("normalizers") == []
    if not is_plain:
        return False
    cuts = any(s["type"] == "Split" or s.get("use_regex") for s in steps)
    return cuts or not tree["model"]["merges"]
