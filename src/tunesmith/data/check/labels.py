"""What kind of task a data set is, how its labels are spread, and what its texts have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

TaskKind = Literal["open_ended", "classification", "conditional_generation"]

_MIN_ANSWERS: Final = 10
_MAX_LABELS: Final = 1_000
_MAX_LABEL_CHARACTERS: Final = 60
_MIN_REPETITIONS: Final = 3  # on average: fewer distinct answers than a third of the rows
# Chinese has no spaces, so there an affix counts as meant once it is this long.
_MEANT_CHARACTERS: Final = 6


@dataclass(frozen=True)
class LabelCounts:
    """How the labels of a classification data set are spread."""

    counts: dict[str, int]
    """Answers by label, the commonest first."""
    num_answers: int
    largest_label: str
    largest_share: float
    singletons: list[str]
    """Labels with one row: they cannot be learned, nor be in both training and validation."""
    variants: list[list[str]]
    """Labels that differ only in letter case, white space or a final full stop."""


@dataclass(frozen=True)
class CommonAffixes:
    """What all texts begin and end with."""

    prefix: str
    suffix: str
    is_all_same: bool
    """All texts are equal: prefix and suffix are then empty."""
    num_suffix_inside: int
    """Texts that hold the suffix once more before their end, where it cannot separate anything."""


def task_kind(prompts: Sequence[str], answers: Sequence[str]) -> TaskKind:
    """The kind of task, by the rule of OpenAI's old data preparation tool.

    Open-ended: no prompt has text. Classification: fewer distinct answers than a third of the
    rows. All else is conditional generation.

    Not caught: classification with few rows a label, several labels in one answer, labels with an
    explanation. Long answers that repeat count as classes too; `label_imbalance` is stricter.
    """
    if not any(prompt.strip() for prompt in prompts):
        return "open_ended"
    distinct = len({answer.strip() for answer in answers})
    return (
        "classification" if distinct * _MIN_REPETITIONS < len(answers) else "conditional_generation"
    )


def label_imbalance(answers: Iterable[str]) -> LabelCounts | None:
    """The spread of labels where the answers are few distinct short texts, else None.

    Labels are at most 1,000, at most 60 characters long, and three rows each on average, in at
    least ten rows. Whether a spread is too uneven is the caller's judgement.

    Not caught: labels inside JSON or sentences, several labels in one answer.
    """
    raw: Counter[str] = Counter()
    for answer in answers:
        raw[answer] += 1
        if len(raw) > _MAX_LABELS or len(answer) > _MAX_LABEL_CHARACTERS:
            return None
    num_answers = raw.total()
    labels: Counter[str] = Counter()
    for answer, count in raw.items():
        labels[answer.strip()] += count
    if num_answers < _MIN_ANSWERS or len(labels) * _MIN_REPETITIONS >= num_answers:
        return None
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    return LabelCounts(
        counts=dict(ranked),
        num_answers=num_answers,
        largest_label=ranked[0][0],
        largest_share=ranked[0][1] / num_answers,
        singletons=[label for label, count in ranked if count == 1],
        variants=_variants(raw),
    )


def _variants(labels: Iterable[str]) -> list[list[str]]:
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(" ".join(label.split()).rstrip(".。").casefold(), []).append(label)
    return [sorted(same) for same in spellings.values() if len(same) > 1]


def common_affixes(texts: Iterable[str]) -> CommonAffixes:
    """The beginning and the end that all texts share, cut back to word boundaries.

    The labels positive and negative both end in "tive", but nobody put that there: an affix may
    not begin or end inside a word of any of the texts. Where a language writes no spaces, six
    characters or more count as put there.

    Not caught: an affix of nearly all texts, shorter affixes of Chinese characters, and a full
    stop that all sentences have anyway, which is reported as a suffix.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        return CommonAffixes("", "", is_all_same=bool(texts), num_suffix_inside=0)
    prefix = _whole_words(common_start(texts), texts)
    backwards = [text[len(prefix) :][::-1] for text in texts]
    suffix = _whole_words(common_start(backwards), backwards)[::-1]
    inside = sum(suffix in text[: -len(suffix)] for text in texts) if suffix else 0
    return CommonAffixes(prefix, suffix, is_all_same=False, num_suffix_inside=inside)


def common_start(texts: Sequence[str]) -> str:
    """The longest string that all texts begin with: what the least and the greatest share."""
    low, high = min(texts), max(texts)
    pairs = zip(low, high, strict=False)
    end = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))
    return low[:end]


def _whole_words(prefix: str, texts: list[str]) -> str:
    """`prefix` without the part of a word at its end that goes on in some text."""
    next_characters = {text[len(prefix) : len(prefix) + 1] for text in texts}
    if not any(map(_is_word, next_characters)):
        return prefix
    end = len(prefix)
    while end and _is_word(prefix[end - 1]):
        end -= 1
    is_meant = len(prefix) - end >= _MEANT_CHARACTERS and not prefix[end:].isascii()
    return prefix if is_meant else prefix[:end]


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
