"""Differences between two texts: by words, and by characters where a script has no spaces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

Kind = Literal["same", "extra", "missing", "other"]

TOKEN = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"  # CJK and kana
    r"|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"  # Thai, Lao, Burmese, Khmer
    r"|[^\W_]+(?:['’][^\W_]+)*"
    r"|\s+"
    r"|."
)
"""A word, a run of spaces, or one sign; of Chinese, Japanese and Korean one character."""

MOST_TOKENS = 1_000
"""Compared of a text: the time grows with the square."""

LEAST_COMMON = 0.25
"""Texts that share less than this are other texts: marking every sign would say nothing."""


@dataclass(frozen=True)
class Piece:
    """A piece of a text that is shown in one way.

    Args:
        text: of it.
        kind: against the data's answer: as there, not there, or only there; `other` if the texts
            have so little in common that marks would say nothing.
        is_new: whether the other model's answer does not have it.
    """

    text: str
    kind: Kind = "same"
    is_new: bool = False


def compare_texts(text: str, label: str | None = None, earlier: str | None = None) -> list[Piece]:
    """Cuts a text where it differs from the data's answer, and from an earlier answer.

    Args:
        text: what is shown.
        label: the data's own answer; without one nothing is extra or missing.
        earlier: another model's answer; without one nothing is new.
    """
    words = tokens_of(text)
    pieces = [Piece(word) for word in words]
    if earlier is not None and earlier != text:
        for start, stop, _ in _changes(words, tokens_of(earlier)) or ():
            pieces[start:stop] = [replace(each, is_new=True) for each in pieces[start:stop]]
    if label is not None and label != text:
        changes = _changes(words, tokens_of(label))
        if changes is None:
            return _joined([replace(each, kind="other", is_new=False) for each in pieces])
        for start, stop, missing in reversed(changes):
            pieces[start:stop] = [replace(each, kind="extra") for each in pieces[start:stop]]
            if missing:
                pieces.insert(stop, Piece(missing, "missing"))
    return _joined(pieces)


def tokens_of(text: str) -> list[str]:
    """The words and signs of a text; joined they are the text."""
    return TOKEN.findall(text)


def _changes(words: Sequence[str], others: Sequence[str]) -> list[tuple[int, int, str]] | None:
    """(Start, stop, what stands there instead in the other text) of each difference.

    None if hardly anything is common.
    """
    if len(words) > MOST_TOKENS or len(others) > MOST_TOKENS:
        words, others = words[:MOST_TOKENS], others[:MOST_TOKENS]
    matcher = SequenceMatcher(None, words, others, autojunk=False)
    if matcher.real_quick_ratio() < LEAST_COMMON or matcher.ratio() < LEAST_COMMON:
        return None
    return [
        (start, stop, "".join(others[other_start:other_stop]))
        for tag, start, stop, other_start, other_stop in matcher.get_opcodes()
        if tag != "equal"
    ]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbors of one look as one piece."""
    groups = groupby(pieces, lambda piece: (piece.kind, piece.is_new))
    return [
        Piece("".join(each.text for each in group), kind, is_new)
        for (kind, is_new), group in groups
    ]


def cut_pieces(pieces: Sequence[Piece], characters: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces of the first characters, and those behind."""
    shown: list[Piece] = []
    for index, piece in enumerate(pieces):
        if len(piece.text) > characters:
            head, tail = piece.text[:characters], piece.text[characters:]
            rest = [replace(piece, text=tail), *pieces[index + 1 :]]
            return [*shown, *([replace(piece, text=head)] if head else [])], rest
        shown.append(piece)
        characters -= len(piece.text)
    return shown, []
