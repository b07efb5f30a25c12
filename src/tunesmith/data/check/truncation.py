"""Answers that stop in the middle: a model trained on them learns to stop there too."""

from __future__ import annotations

import re
from typing import Final

_MIN_LETTERS: Final = 120  # below this an answer may well be a label, a title or a fragment
_MIN_LAST_LINE: Final = 60
_CHINESE_WEIGHT: Final = 3  # one Chinese character says about as much as three letters

_CONTINUED: Final = re.compile(
    r"(?:未完待续|待续|接下文|下文继续|to be continued|continued|truncated|cut off|omitted)"
    r"[\s.。…)）\]】>*_]*$",
    re.IGNORECASE,
)
_ELLIPSIS: Final = re.compile(r"(?:\.{3,}|…+|。{3,})[\s*_]*$")
_MIDWAY: Final = re.compile(r"[,，、;；]$")
_JOINING: Final = re.compile(
    r"(?:\b(?:and|or|but|the|an|of|to|with|for|because|which|than|from|by|into|your|their|its|our)"
    r"|(?:以及|并且|而且|但是|因为|所以|如果|例如|比如|包括|或者|由于|通过|和|与|及|或|的话))$",
    re.IGNORECASE,
)
_CHINESE: Final = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
_WORD: Final = re.compile(r"[^\W\d_]{2,}")
_SENTENCE_END: Final = re.compile(r"[.!?](?:[\s\"'”’)]|$)|[。！？]")
_NOT_PROSE: Final = re.compile(
    r"^\s*(?:[-*+•·●○▪–—>#|]|\(?\d+[.)、:：]|[（(][\d一二三四五六七八九十]+[)）]|[一二三四五六七八九十]+[、.]"
    r"|[A-Za-z][.)]\s|\[\d|https?://|\$|\\)"
)
_CODE_SIGNS: Final = re.compile(r"[={}<>|\\^$]|\w\(|https?://|@")
_PAIRS: Final = {"(": ")", "（": "）", "[": "]", "【": "】", "《": "》", "「": "」", "“": "”"}
_SIGNED: Final = re.compile(r"#\w+$|[\"'”)]\s*[-–—~]\s*[\w. ]+$")  # a hashtag; a name under a quote
_FENCE: Final = re.compile(r"^\s*```", re.MULTILINE)
_JSON_START: Final = re.compile(r'^(?:\{\s*"|\[\s*[{\["])')


def looks_truncated(answer: str) -> str | None:
    """Why `answer` seems to stop in the middle, or None.

    Judged are: words like 未完待续 and "to be continued", an unfinished JSON value, an open code
    fence, and for prose of more than about 120 letters (40 Chinese characters) a last line that
    ends in a comma, a joining word, an ellipsis, an open bracket or quote, or without any
    punctuation where the lines before have it.

    Not caught: an answer cut exactly after a sentence, an unfinished list or table, code cut
    outside a fence, short answers. A verse may be reported though it is whole.
    """
    text = answer.rstrip()
    if not text:
        return None
    return _says_so(text) or _unfinished_json(text) or _open_fence(text) or _unfinished_prose(text)


def _says_so(text: str) -> str | None:
    found = _CONTINUED.search(text[-60:])
    # "The meeting was continued." is prose; the notice stands alone, in brackets or after a break.
    if found and (found.group()[0] > "\u3000" or _stands_alone(text[-60:], found.start())):
        return f'ends with the notice "{found.group().strip()}"'
    return None


def _stands_alone(tail: str, start: int) -> bool:
    before = tail[:start].rstrip(" ")
    return not before or before[-1] in "\n([<（【*_…." or tail[start:].lower().startswith("to be")


def _unfinished_json(text: str) -> str | None:
    """Follows brackets and strings only, so a complete value with small faults is not reported."""
    if not _JSON_START.match(text):
        return None
    depth, in_string, skip = 0, False, False
    for char in text:
        if skip:
            skip = False
        elif char == "\\":
            skip = in_string
        elif char == '"':
            in_string = not in_string
        elif not in_string:
            depth += (char in "{[") - (char in "}]")
            if depth == 0:
                return None
    return f"JSON ends with {depth} open bracket{'s' * (depth > 1)}" if depth > 0 else None


def _open_fence(text: str) -> str | None:
    return "a code fence (```) is not closed" if len(_FENCE.findall(text)) % 2 else None


def _unfinished_prose(text: str) -> str | None:
    if len(text) < _MIN_LETTERS and _letters(text) < _MIN_LETTERS:
        return None
    line = text[text.rfind("\n") + 1 :].strip()
    if _MIDWAY.search(line):
        return f'ends with "{line[-1]}"'
    if _CODE_SIGNS.search(line) or "```" in text:
        return None
    if _NOT_PROSE.match(line) and not _items_end(text):
        return None
    if _ELLIPSIS.search(line[-20:]):
        return "ends with an ellipsis"
    joining = _JOINING.search(line)
    if joining:
        return f'ends with the joining word "{joining.group()}"'
    return _open_pair(line) or _no_end(text, line)


def _open_pair(line: str) -> str | None:
    """An opening bracket or quote in the last sentence that nothing closes."""
    ends = [found.end() for found in _SENTENCE_END.finditer(line[:-1])]
    sentence = line[ends[-1] :] if ends else line
    for opening, closing in _PAIRS.items():
        where = sentence.rfind(opening)
        # “ twice: somebody closes quotes with it.
        if sentence.count(opening) == 1 and closing not in sentence[where:]:
            return f'"{opening}" is not closed in the last sentence'
    return None


def _no_end(text: str, line: str) -> str | None:
    """A long last line that ends in a bare word, where the sentences before end properly."""
    if _letters(line) < _MIN_LAST_LINE or not line[-1].isalnum() or _SIGNED.search(line):
        return None
    if len(_WORD.findall(line)) < 8 and not _CHINESE.search(line):
        return None
    if len(_SENTENCE_END.findall(text)) < 2 or _is_list(text):
        return None
    return f'the last sentence has no end: "...{line[-20:]}"'


def _is_list(text: str) -> bool:
    """Whether most lines are alike in having no end, as in a list, a poem or a letter."""
    lines = [line for line in text.splitlines() if line.strip()]
    open_ended = sum(line.rstrip()[-1].isalnum() for line in lines[:-1])
    return len(lines) > 1 and open_ended * 2 >= len(lines) - 1


def _items_end(text: str) -> bool:
    """Whether the list items before the last line all end in punctuation, so that it should too."""
    items = [line.rstrip() for line in text.splitlines()[:-1] if _NOT_PROSE.match(line)]
    return len(items) >= 2 and all(item[-1] in ".!?。！？;；" for item in items)


def _letters(text: str) -> int:
    return len(text) + (_CHINESE_WEIGHT - 1) * len(_CHINESE.findall(text))
