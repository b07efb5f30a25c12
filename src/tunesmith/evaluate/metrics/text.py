"""How texts become what metrics count: characters of Chinese and its like, words of the rest."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Literal

import regex

Script = Literal["zh", "ja", "unspaced", "spaced"]

# The long-vowel mark belongs to no script by itself.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_HAN = regex.compile(r"\p{Han}")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}ー]")
_WITHOUT_SPACES = regex.compile(rf"[{_UNSPACED}]")
_LETTER = regex.compile(r"[\p{L}\p{N}]")
_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+"
_WORDS = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|{_WORD}", regex.VERSION1)
_UNITS = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|{_WORD}|\S", regex.VERSION1)

UNSPACED_SHARE = 0.1
"""Chinese texts with code, names and numbers in them still are Chinese."""


def script_of(texts: Iterable[str]) -> Script:
    """Which writing the texts are in, as far as it decides how they are cut.

    Japanese, where a tenth of what is written without spaces is kana; Chinese else.
    """
    joined = "\n".join(texts)
    letters = len(_LETTER.findall(joined))
    unspaced = len(_WITHOUT_SPACES.findall(joined))
    if not letters or unspaced < UNSPACED_SHARE * letters:
        return "spaced"
    kana, han = len(_KANA.findall(joined)), len(_HAN.findall(joined))
    if kana > 0.1 * unspaced:
        return "ja"
    return "zh" if han >= 0.5 * unspaced else "unspaced"


def normalize(text: str) -> str:
    """Unicode NFKC (full-width letters and marks become plain), without space at both ends."""
    return unicodedata.normalize("NFKC", text).strip()


def words(text: str) -> list[str]:
    """Lower-case words, characters of writing without spaces each alone; no marks."""
    return _WORDS.findall(text.lower())


def units(text: str) -> list[str]:
    """As `words`, with every mark of punctuation as one more."""
    return _UNITS.findall(text.lower())


def has_letter(parts: Iterable[str]) -> bool:
    """Whether any is more than marks."""
    return any(_LETTER.search(part) for part in parts)


def without_thinking(answer: str) -> str:
    """What a model says after its thinking; a thinking without an end leaves nothing."""
    before, mark, after = answer.rpartition("</think>")
    if mark:
        return after.lstrip()
    return "" if not before and answer.lstrip().startswith("<think>") else answer
