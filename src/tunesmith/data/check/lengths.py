"""What happens to a sample that is longer than a sequence may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.config.auto import TEXT_TOKENS
from tunesmith.data.tokenize import TokenSequence

Overlong = Literal["auto", "drop", "cut_right", "cut_left", "split"]


@dataclass(frozen=True)
class Limit:
    """How long samples may be.

    Args:
        tokens: of a sequence; None asks nothing.
        overlong: what the recipe does to longer ones.
        is_auto: the recipe left the number open, so `tokens` is the model's context.
    """

    tokens: int | None
    overlong: Overlong = "auto"
    is_auto: bool = False

    def for_text(self, longest_answer: int, longest_text: int) -> int | None:
        """The limit for raw text: left open, it is that of the longest other sample, or more."""
        if self.tokens is None or not self.is_auto:
            return self.tokens
        is_split = self.overlong in ("auto", "split")
        pieces = min(longest_text, TEXT_TOKENS if is_split else longest_text, self.tokens)
        return max(min(longest_answer, self.tokens), pieces, 8)


@dataclass(frozen=True)
class Fate:
    """What becomes of one overlong sample, in words, and its tokens that are still used."""

    text: str
    used_tokens: int


def num_pieces(length: int, most: int) -> int:
    """Pieces of a sequence that is split: neighbors share one token."""
    return -(-(length - 1) // (most - 1))


def fate_of(sequences: Sequence[TokenSequence], most: int, overlong: Overlong) -> Fate:
    """What training does to a sample of which a sequence is longer than `most` tokens."""
    total = sum(len(sequence.ids) for sequence in sequences)
    if overlong == "drop":
        return Fate("left out", 0)
    if overlong == "split":
        pieces = sum(num_pieces(len(sequence.ids), most) for sequence in sequences)
        return Fate(f"cut into {pieces:,} pieces", total)
    used = sum(min(len(sequence.ids), most) for sequence in sequences)
    learned = sum(length for sequence in sequences for _, length, _ in sequence.runs)
    lost = learned - sum(_left(sequence, most, overlong) for sequence in sequences)
    if lost == learned:
        return Fate(f"left out, nothing is left to learn in the first {most:,}", 0)
    side = "start" if overlong == "cut_left" else "end"
    if not lost:
        return Fate(f"its {side} is cut off, nothing supervised with it", used)
    return Fate(f"its {side} is cut off, with {lost:,} of {learned:,} supervised tokens", used)


def _left(sequence: TokenSequence, most: int, overlong: Overlong) -> int:
    """Supervised tokens in the part that is kept."""
    length = len(sequence.ids)
    start = max(0, length - most) if overlong == "cut_left" else 0
    stop = min(length, start + most)
    return sum(
        max(0, min(first + size, stop) - max(first, start)) for first, size, _ in sequence.runs
    )
