"""Mojibake: text that was decoded with the wrong encoding, and characters that are never text."""

from __future__ import annotations

import re
from typing import Final


def _as_cp1252(byte: int) -> str:
    """The character that CP1252 shows for `byte`; Latin-1's where CP1252 has none."""
    return bytes([byte]).decode("cp1252", errors="ignore") or chr(byte)


_BYTE_OF: Final = {_as_cp1252(byte): byte for byte in range(0x80, 0x100)} | {
    chr(byte): byte for byte in range(0x80, 0x100)
}
_TAIL: Final = "".join(re.escape(char) for char, byte in _BYTE_OF.items() if 0x80 <= byte < 0xC0)
_UTF8_AS_CP1252: Final = re.compile(f"(?:[Â-ß][{_TAIL}]|[à-ï][{_TAIL}]{{2}}|[ð-ô][{_TAIL}]{{3}})+")
# Signs that stand after a letter in healthy text (É”, café…», 50 ß–): weak evidence alone.
_INNOCENT: Final = frozenset("“”‘’„‚…–—«»\u00a0·°™®©")
# Single pieces that are broken for certain all the same: é, °, ©, ®, the no-break space.
_PLAIN: Final = frozenset(("Ã©", "Â°", "Â©", "Â®", "Â\u00a0"))
_READABLE: Final = re.compile(
    "[\u00a0-\u017f\u0370-\u04ff\u2010-\u203a\u20ac\u2100-\u22ff\u2500-\u27bf"
    "\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7af\uff00-\uffef\U0001f300-\U0001faff]+"
)

# Three-byte UTF-8 of Chinese text and its punctuation, seen in the bytes of GBK.
_UTF8_IN_GBK: Final = re.compile(rb"(?:[\xe3-\xe9\xef][\x80-\xbf]{2}){2,}")
# With less than two whole characters, only the commonest ones tell: 的 read as GBK is 鐨 and half
# of another character, which depends on the first byte of what follows.
_COMMONEST: Final = "的一是不了在有这我为他们中大来上个国说时要你好，。、“”：？！；（）《》"
_TELLTALES: Final = frozenset(
    (char.encode() + bytes([following])).decode("gb18030", errors="ignore")
    for char in _COMMONEST
    for following in (*range(0xE2, 0xEA), 0xEF)
) | {"涓€"}  # 一: Windows shows the byte 0x80 as the euro sign
_GBK_TELLTALES: Final = re.compile("|".join(sorted(pair for pair in _TELLTALES if len(pair) == 2)))
_ACCENTED: Final = re.compile("[\xa1-\xff]")
_GBK_AS_LATIN1: Final = re.compile("[¡-ÿ]{4,}")
_LOST: Final = re.compile(
    "\ufffd+|ï»¿|锘[縍\ue000-\uf8ff]?|锟斤拷|锟斤|(?:烫){3,}|(?:屯){4,}|(?<=.)\ufeff", re.DOTALL
)
# Tab, line feed, form feed and carriage return are text; so is U+0085, a line end on mainframes.
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")


def find_mojibake(text: str) -> str | None:
    """The first piece of `text` that looks decoded with the wrong encoding, or None.

    Sees UTF-8 read as CP1252 or Latin-1 (Ã©, â€™) or as GBK (鐨勪, 浣犲ソ), GBK read as Latin-1
    (ÄãºÃ), the characters that replace lost ones (U+FFFD, 锟斤拷, 烫烫烫), a byte order mark that
    is not at the start, and control characters. The piece is returned as it stands: escape it
    before showing it.

    Not caught: other pairs of encodings (Shift-JIS, KOI8-R, Big5 read as GBK), a single accented
    letter whose sign also follows letters in healthy text (É”), one broken Chinese character
    alone, and text in which the broken characters were already replaced by question marks.
    """
    found = _LOST.search(text)
    if found:
        return found.group()
    if text.isascii():
        return _first(_CONTROL, text)
    has_accents = _ACCENTED.search(text) is not None
    return (
        (_utf8_as_cp1252(text) if has_accents else None)
        or _first(_CONTROL, text)
        or _utf8_as_gbk(text)
        or (_gbk_as_latin1(text) if has_accents else None)
    )


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found.group() if found else None


def _utf8_as_cp1252(text: str) -> str | None:
    for found in _UTF8_AS_CP1252.finditer(text):
        piece = found.group()
        meant = bytes(_BYTE_OF[char] for char in piece).decode("utf-8", errors="ignore")
        if not _READABLE.fullmatch(meant):
            continue
        tails = [char for char in piece if not "À" <= char <= "ÿ"]
        if len(meant) > 1 or any(char not in _INNOCENT for char in tails) or piece in _PLAIN:
            return piece
    return None


def _utf8_as_gbk(text: str) -> str | None:
    """A run whose GBK bytes are the UTF-8 of at least two everyday Chinese characters.

    Healthy Chinese gives such bytes by accident, but then they spell rare characters; so all of
    them must stand in the first level of GB2312, the 3,755 commonest.
    """
    raw = text.encode("gb18030", errors="replace")
    for found in _UTF8_IN_GBK.finditer(raw):
        meant = found.group().decode("utf-8", errors="ignore")
        if len(meant) * 3 == len(found.group()) and all(map(_is_everyday, meant)):
            start, end = (
                _characters_before(raw, found.start()),
                _characters_before(raw, found.end()),
            )
            return text[start:end]
    return _first(_GBK_TELLTALES, text)


def _is_everyday(char: str) -> bool:
    raw = char.encode("gb2312", errors="ignore")
    return len(raw) == 2 and (raw[0] in (0xA1, 0xA3) or 0xB0 <= raw[0] <= 0xD7)


def _characters_before(raw: bytes, end: int) -> int:
    return len(raw[:end].decode("gb18030", errors="ignore"))


def _gbk_as_latin1(text: str) -> str | None:
    for found in _GBK_AS_LATIN1.finditer(text):
        piece = found.group()
        signs = sum(char < "À" for char in piece)
        if len(piece) % 2 or not 0 < signs < len(piece) or len(set(piece)) < 3:
            continue
        meant = piece.encode("latin-1").decode("gb2312", errors="ignore")
        everyday = sum(map(_is_everyday, meant))
        if everyday * 2 >= 0.8 * len(piece):
            return piece
    return None
