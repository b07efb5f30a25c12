"""`match`, `regex` and `format`: what an answer's text is or looks like."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import regex

from tunesmith.objectives.rewards.base import Answered

Where = Literal["whole", "contains", "start", "end", "last_line"]

_SPACE = re.compile(r"\s+")
_SPACE_BESIDE_CHINESE = re.compile(r"(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])")
_INSIDE_A_WORD = re.compile(r"[A-Za-z0-9][.,:'’/-][A-Za-z0-9]|[-+]\d")


@dataclass(frozen=True)
class TextForm:
    """In which respects two texts may differ and still be the same."""

    ignore_case: bool = True
    ignore_space: bool = True
    ignore_punctuation: bool = True

    def __call__(self, text: str) -> str:
        """The text in a form that is compared; full-width signs become their usual ones."""
        text = unicodedata.normalize("NFKC", text)
        text = text.casefold() if self.ignore_case else text
        text = _without_punctuation(text) if self.ignore_punctuation else text
        if not self.ignore_space:
            return text
        return _SPACE_BESIDE_CHINESE.sub("", _SPACE.sub(" ", text).strip())


def _without_punctuation(text: str) -> str:
    """Spaces for punctuation, but not inside of words and numbers: 3.5, -2, it's."""
    kept = {found.start() for found in _INSIDE_A_WORD.finditer(text)}
    kept |= {place + 1 for place in kept}
    return "".join(
        " " if unicodedata.category(character)[0] == "P" and place not in kept else character
        for place, character in enumerate(text)
    )


@dataclass(frozen=True)
class MatchReward:
    """1 where the answer is the reference, or has it in a place; 0 elsewhere.

    What an answer thinks, up to `</think>`, does not count.

    Args:
        where: the whole answer, anywhere in it (as whole words), its start, end or last line.
        text: what is looked for instead of the reference.
    """

    where: Where = "whole"
    text: str | None = None
    ignore_case: bool = True
    ignore_space: bool = True
    ignore_punctuation: bool = True

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One verdict for each answer; None where there is nothing to compare with."""
        form = TextForm(self.ignore_case, self.ignore_space, self.ignore_punctuation)
        return [self._judge(answered, form) for answered in answers]

    def _judge(self, answered: Answered, form: TextForm) -> float | None:
        wanted = form(answered.reference if self.text is None else self.text)
        if not wanted.strip():
            return None
        answer = answered.answer.rpartition("</think>")[2]
        if self.where == "last_line":
            answer = next((line for line in reversed(answer.splitlines()) if line.strip()), "")
        answer = form(answer)
        if self.where in ("whole", "last_line"):
            return float(answer == wanted)
        return float(_has_words(answer, wanted, self.where))


def _has_words(text: str, words: str, where: Where) -> bool:
    """Whether a text has some words that are not parts of longer ones: no 4 in 42."""
    is_word = re.compile(r"[A-Za-z0-9_]")
    pattern = re.escape(words)
    pattern = rf"(?<![A-Za-z0-9_]){pattern}" if is_word.match(words[0]) else pattern
    pattern = rf"{pattern}(?![A-Za-z0-9_])" if is_word.match(words[-1]) else pattern
    pattern = {"start": rf"\A{pattern}", "end": rf"{pattern}\Z"}.get(where, pattern)
    return re.search(pattern, text) is not None


@dataclass(frozen=True)
class RegexReward:
    """1 where a pattern fits the answer, or where a group of it is the reference; 0 elsewhere.

    The `regex` library (one of transformers' own needs) stops a pattern that backtracks without
    end; the standard library's `re` can only be stopped by ending its process. An answer at which
    it was stopped is not judged.

    Args:
        pattern: where `.` fits line ends too.
        how: the pattern fits somewhere in the answer, or all of it.
        group: number or name of the group that is compared with the reference, as `match` does.
    """

    pattern: str
    how: Literal["search", "fullmatch"] = "search"
    group: int | str | None = None
    timeout_seconds: float = 1.0

    @cached_property
    def _compiled(self) -> regex.Pattern[str]:
        return regex.compile(self.pattern, regex.DOTALL)

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One verdict for each answer."""
        return [self._judge(answered) for answered in answers]

    def _judge(self, answered: Answered) -> float | None:
        if self.group is not None and not answered.reference.strip():
            return None
        fit = self._compiled.search if self.how == "search" else self._compiled.fullmatch
        try:
            found = fit(answered.answer, timeout=self.timeout_seconds)
        except TimeoutError:
            return None
        if found is None or self.group is None:
            return float(found is not None)
        form = TextForm()
        return float(form(found[self.group] or "") == form(answered.reference))


@dataclass(frozen=True)
class FormatReward:
    """1 where tags stand in order, each once and with something inside (arXiv 2501.12948 §2.2.2).

    Args:
        tags: names, such as `think` and `answer`.
        whole: nothing stands outside of the tags; otherwise text may follow the last one, and
            something has to.
        is_opened: the prompt ends with the first opening tag, as some chat templates have it.
        partial: the share of tags, opening and closing, that stand there exactly once, where the
            form is not fulfilled (open-r1's tag count).
    """

    tags: Sequence[str] = ("think", "answer")
    whole: bool = True
    is_opened: bool = False
    partial: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # No tag holds another: `[^<]` or a `<` that begins none of them, which never backtracks.
        names = "|".join(re.escape(tag) for tag in self.tags)
        inside = rf"(?=\s*[^\s<]|\s*<(?!/?(?:{names})>))(?:[^<]|<(?!/?(?:{names})>))*"
        parts = [rf"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in self.tags]
        if self.is_opened:
            parts[0] = parts[0].removeprefix(f"<{re.escape(self.tags[0])}>")
        return re.compile(r"\s*" + r"\s*".join(parts) + (r"\s*" if self.whole else inside))

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One verdict for each answer."""
        return [self._judge(answered.answer) for answered in answers]

    def _judge(self, answer: str) -> float:
        if self._pattern.fullmatch(answer):
            return 1.0
        if not self.partial:
            return 0.0
        wanted = [sign for tag in self.tags for sign in (f"<{tag}>", f"</{tag}>")]
        wanted = wanted[1:] if self.is_opened else wanted
        return sum(answer.count(sign) == 1 for sign in wanted) / len(wanted)
