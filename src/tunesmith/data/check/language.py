"""Which language a text is in: counts of scripts, then of stop words. No model, no dependency."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import numpy as np

from tunesmith.data.check import chinese
from tunesmith.data.check.chinese import script_mix

__all__ = ["detect_language", "script_mix"]

SAMPLE_CHARACTERS: Final = 2_000

# Code point ranges (first, last + 1) of the scripts that tell languages apart.
_RANGES: Final = (
    (0x41, 0x5B, "latin"),
    (0x61, 0x7B, "latin"),
    (0xC0, 0x250, "latin"),
    (0x370, 0x400, "other"),  # Greek
    (0x400, 0x530, "cyrillic"),
    (0x530, 0x600, "other"),  # Armenian, Hebrew
    (0x600, 0x780, "arabic"),
    (0x780, 0x1100, "other"),  # the scripts of India, Thai, Georgian and more
    (0x1100, 0x1200, "hangul"),
    (0x1E00, 0x1F00, "latin"),
    (0x3040, 0x30FB, "kana"),
    (0x3131, 0x318F, "hangul"),
    (0x3400, 0xA000, "han"),
    (0xAC00, 0xD7B0, "hangul"),
    (0x20000, 0x32000, "han"),
)
_EDGES: Final = np.array([edge for low, high, _ in _RANGES for edge in (low, high)])
# One character of these scripts says about as much as this many letters.
_LETTERS_PER_CHARACTER: Final = {"han": 3, "kana": 3, "hangul": 2}
_MIN_LETTERS: Final = 6
_MIN_KANA_SHARE: Final = 0.1
_CODE_SHARE: Final = 0.6
_MAX_CODE_LINE: Final = 300
# A headline or a list of names in a known language has no stop words either.
_MIN_WORDS_TO_RULE_OUT: Final = 12

_STOP_WORDS: Final = {
    "en": "the a no and of to in is are was for with that this it you your i what how an be on as "
    "by can please have not do does my we from or which he she his her they one at has",
    "de": "der die das und ist nicht ein eine einen dem den zu mit für auf von sich auch wie was "
    "ich sie wir wird sind im bei oder bitte es als",
    "fr": "le la les des et est une un du dans pour que qui pas vous nous je il elle sur avec au "
    "aux ce cette plus comment quel quelle être sont par",
    "es": "el la los las y es una un del de en que por para con no se su como más pero qué cómo "
    "cuál este esta son lo al está muy",
    # Neighbors that would otherwise be taken for one of the four.
    "pt": "o os as e é uma um do da dos das em que não para com por como mais se ao são você",
    "it": "il lo gli e è una un di del della che non per con sono come più nel alla anche",
    "nl": "de het een en is niet van dat op te zijn voor met aan ook er maar wat hoe ik je",
}
_WORD_SETS: Final = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
_NAMED: Final = ("en", "de", "fr", "es")
_WORD: Final = re.compile(r"[^\W\d_]+")
_URL: Final = re.compile(r"\w+://\S+|\S+@\S+")
_FENCED: Final = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE_LINE: Final = re.compile(
    r"""^\s*(?:
        (?:async\ )?(?:def|class)\s+\w+.*: | (?:from\s+[\w.]+\s+)?import\s+[\w.{*][^.]*  # Python
      | (?:if|elif|for|while|with|try|except|else|finally)\b.*: | return\b.*[\w)\]]
      | \#(?:include\b|define\b|!).* | using\ namespace\b.* | package\s+[\w.]+  # C and kin
      | (?:public|private|protected|static|function|func|fn|const|let|var|int|void)\s.*[{};)=,]
      | .*[=()\]].*; | (?:return|break|continue)\b[^.]*; | .*\{ | [}\])]+[;,]? | .*\)\s*=>\s*.*
      | [\w.\[\]'"]+\s*[-+*/]?=\s*\S.* | [\w.]+\([^()]*\) | (?://|/\*|\*/).* | @\w+(?:\(.*\))?
      | SELECT\s.* | (?:INSERT\ INTO|UPDATE|CREATE\ TABLE|FROM|WHERE|GROUP\ BY)\s.*  # SQL
      | </?[A-Za-z][\w-]*(?:\s[^<>]*)?/?>.* | .*</[a-z]\w*>  # markup
      | "[^"]+"\s*:\s.* | \{".*  # JSON
    )\s*$""",
    re.VERBOSE,
)


def detect_language(text: str) -> str:
    """The main language of `text`, judged by its first 2,000 characters.

    Returns:
        One of zh-Hans, zh-Hant, en, ja, ko, ru, ar, de, fr, es, code, other, or "" where there is
        too little text to tell: a few letters, numbers alone, a name.

    Not caught: Chinese without a character that differs between the scripts counts as zh-Hans, and
    Japanese written in Chinese characters alone as Chinese; every language in Cyrillic letters
    counts as ru and every one in Arabic letters as ar; romanized text is other. A text in two
    languages gets the one with more of it; code is named only where it is most of the text.
    """
    text = text[:SAMPLE_CHARACTERS]
    letters = _count_letters(text)
    if sum(letters.values()) < _MIN_LETTERS:
        return ""
    if _code_share(text) >= _CODE_SHARE:
        return "code"
    script = max(letters, key=lambda name: letters[name])
    if script == "east_asian":
        return _chinese_or_japanese(text)
    if script == "latin":
        return _by_stop_words(text)
    return {"hangul": "ko", "cyrillic": "ru", "arabic": "ar"}.get(script, "other")


def _count_letters(text: str) -> Counter[str]:
    """Letters by script, characters of dense scripts weighted; Chinese and kana count together."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(np.searchsorted(_EDGES, codes, side="right"), minlength=len(_EDGES) + 1)
    letters: Counter[str] = Counter()
    for i, (_, _, script) in enumerate(_RANGES):
        name = "east_asian" if script in {"han", "kana"} else script
        letters[name] += int(counts[2 * i + 1]) * _LETTERS_PER_CHARACTER.get(script, 1)
    return letters


def _chinese_or_japanese(text: str) -> str:
    kana = sum("\u3040" <= char < "\u30fb" for char in text)
    han = sum("\u3400" <= char < "\ua000" for char in text)
    if kana >= _MIN_KANA_SHARE * (kana + han):
        return "ja"
    simplified, traditional = chinese.count_scripts(text)
    return "zh-Hant" if traditional > simplified else "zh-Hans"


def _by_stop_words(text: str) -> str:
    words = [word.lower() for word in _WORD.findall(_URL.sub(" ", text))]
    hits = {name: sum(word in known for word in words) for name, known in _WORD_SETS.items()}
    best = max(hits, key=lambda name: hits[name])
    if hits[best] < 0.1 * len(words):
        return "other" if len(words) >= _MIN_WORDS_TO_RULE_OUT else ""
    if hits[best] == 1 and len(words) < 4:
        return ""
    return best if best in _NAMED else "other"


def _code_share(text: str) -> float:
    """The share of the characters that stand in fenced blocks or in lines that look like code."""
    outside = _FENCED.sub("", text)
    fenced = len(text) - len(outside)
    lines = [line for line in outside.splitlines() if line.strip()]
    in_code = sum(len(line) for line in lines if _is_code(line))
    return (fenced + in_code) / max(1, fenced + sum(map(len, lines)))


def _is_code(line: str) -> bool:
    # Long lines are prose or data, and the pattern's cost grows with the square of the length.
    if len(line) > _MAX_CODE_LINE:
        return line.lstrip().startswith(('{"', '[{"', "<"))
    return _CODE_LINE.match(line) is not None
