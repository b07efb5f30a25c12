"""Full-width and half-width forms of one letter, digit or sign mixed in one text."""

from __future__ import annotations

import re
from typing import Final

_HAN: Final = "\u3400-\u9fff"
_CLASSES: Final = (
    ("letters", re.compile("[Ａ-Ｚａ-ｚ]"), re.compile("[A-Za-z]")),
    ("digits", re.compile("[０-９]"), re.compile("[0-9]")),
)
# Only between or after Chinese characters: in an English phrase or a number the half-width sign is
# right. Left out are : ( ) and . that careful writers too put half-width into Chinese.
_HALF_SIGN: Final = re.compile(f"(?<=[{_HAN}])[,;!?](?=[{_HAN}]|\\s*$)", re.MULTILINE)
_FULL_SIGN: Final = re.compile("[，；！？]")
_MIN_SIGNS: Final = 2


def mixed_widths(text: str) -> str | None:
    """How `text` mixes full-width and half-width forms, or None.

    Fires for ＡＢＣ beside ABC, for １２３ beside 123, and for at least two half-width commas,
    semicolons, exclamation or question marks in Chinese beside at least two full-width ones.

    Not caught: texts that are wrong throughout (only half-width signs in Chinese), colons,
    brackets, full stops and spaces, half-width katakana, and a single slip.
    """
    if text.isascii():
        return None
    for name, full, half in _CLASSES:
        wide, narrow = full.findall(text), half.findall(text)
        if wide and narrow:
            return f"full-width {name} ({_some(wide)}) beside half-width ones ({_some(narrow)})"
    narrow, wide = _HALF_SIGN.findall(text), _FULL_SIGN.findall(text)
    if min(len(wide), len(narrow)) < _MIN_SIGNS:
        return None
    return (
        f"{len(narrow)} half-width signs ({_some(narrow)}) between Chinese characters, "
        f"{len(wide)} full-width ones ({_some(wide)})"
    )


def _some(characters: list[str]) -> str:
    return " ".join(list(dict.fromkeys(characters))[:4])
