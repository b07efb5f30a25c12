"""What `tunesmith check` may find: every code with what it means for training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tunesmith.errors import MAX_PROBLEMS, Problem

ADVICE = {
    "data.duplicate": "learned twice as much; --fix keeps the first",
    "data.near-duplicate": "are rows that are nearly equal meant?",
    "data.leak": "makes validation look better than it is",
    "data.near-leak": "makes validation look better than it is",
    "data.truncated-answer": "teaches to stop in the middle",
    "data.overlong": "raise data.max_length, or set data.overlong",
    "data.no-end": "the model does not learn to stop",
    "data.mojibake": "teaches rubbish: read the source again",
    "data.special-token": "is encoded as plain text",
    "data.foreign-token": "was the text rendered already?",
    "data.label-imbalance": "add rows of rare labels; spell them alike",
    "data.swapped": "map the columns the other way round",
    "data.secret": "the model may tell it to anyone: take it out",
    "data.mixed-script": "simplified and traditional in one text",
    "data.mixed-width": "full-width and half-width in one text",
    "data.placeholder": "is learned as it stands: fill it in",
    "data.unanswered-end": "is not used",
    "data.no-user": "inference will always have a question",
    "data.empty-prompt": "the answer depends on nothing",
    "data.nothing-to-learn": "left out: none of its tokens has loss",
    "data.few-rows": "a few hundred good rows are better",
    "data.same-prompt": "the answers cannot depend on it",
    "data.same-answer": "there is nothing to choose between",
}
"""Findings that do not stop a training, and what each means, in a few words."""

OF_ALL_ROWS = frozenset(
    (
        "data.label-imbalance",
        "data.swapped",
        "data.few-rows",
        "data.same-prompt",
        "data.same-answer",
    )
)
"""Findings about the data as a whole, not about single rows."""


MAX_ALIKE = 4
"""Warnings of one code that are shown in full."""


@dataclass
class Findings:
    """Counts by code, and the first of each in full."""

    counts: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, list[Problem]] = field(default_factory=dict[str, list[Problem]])

    def add(self, problem: Problem, times: int = 1) -> None:
        """Takes one finding, which stands for `times` rows."""
        self.counts[problem.code] += times
        shown = self.first.setdefault(problem.code, [])
        if len(shown) < MAX_PROBLEMS:
            shown.append(problem)

    def is_error(self, code: str) -> bool:
        """Whether rows with this finding cannot be trained on."""
        return code not in ADVICE

    def codes(self) -> list[str]:
        """All codes, errors first, then by frequency."""
        return sorted(self.counts, key=lambda code: (not self.is_error(code), -self.counts[code]))

    def examples(self, most: int = MAX_PROBLEMS) -> list[Problem]:
        """The first findings of every code, at most `most` in all, shared out among the codes.

        Errors fill the list; of warnings a few of a kind are enough.
        """
        codes = self.codes()[:most]
        shares = dict.fromkeys(codes, 0)
        while most > 0:
            open_codes = [
                code
                for code in codes
                if shares[code] < len(self.first[code])
                and (self.is_error(code) or shares[code] < MAX_ALIKE)
            ]
            if not open_codes:
                break
            for code in open_codes[:most]:
                shares[code] += 1
                most -= 1
        return [problem for code in codes for problem in self.first[code][: shares[code]]]

    @property
    def num_errors(self) -> int:
        """Rows that cannot be used."""
        return sum(count for code, count in self.counts.items() if self.is_error(code))

    @property
    def num_warnings(self) -> int:
        """Findings that do not stop a training."""
        return self.counts.total() - self.num_errors
