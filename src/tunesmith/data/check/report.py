"""What a check found, as plain data: printed, drawn, or written as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from tunesmith.data.check.findings import ADVICE, Findings
from tunesmith.types import Json

NUM_BARS = 24


@dataclass
class SourceReport:
    """One source."""

    name: str
    files: int
    is_held_out: bool = False
    samples: int = 0
    unusable: int = 0


@dataclass(frozen=True)
class Cost:
    """What a training on the data would take, roughly."""

    epochs: int
    tokens: int
    seconds: float
    device: str


@dataclass
class CheckReport:
    """Everything about a data set that a person wants to know before training on it."""

    template: str
    tokenizer: str
    sources: list[SourceReport] = field(default_factory=list[SourceReport])
    findings: Findings = field(default_factory=Findings)
    kinds: Counter[str] = field(default_factory=Counter[str])
    roles: Counter[str] = field(default_factory=Counter[str])
    turns: Counter[int] = field(default_factory=Counter[int])
    messages: Counter[int] = field(default_factory=Counter[int])
    without: Counter[str] = field(default_factory=Counter[str])
    languages: Counter[str] = field(default_factory=Counter[str])
    notes: Counter[str] = field(default_factory=Counter[str])
    facts: list[str] = field(default_factory=list[str])
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    supervised: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    max_length: int | None = None
    training_samples: int = 0
    training_tokens: int = 0
    cost: Cost | None = None

    @property
    def num_samples(self) -> int:
        """Samples that can be read."""
        return self.kinds.total()

    @property
    def num_tokens(self) -> int:
        """Tokens of one pass over all samples, nothing cut off."""
        return int(self.lengths.sum())

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that carry loss."""
        return float(self.supervised.sum() / max(self.num_tokens, 1))

    def quantiles(self) -> dict[str, int]:
        """Tokens of a short, a middling, a long and the longest sample, and the mean."""
        return quantiles(self.lengths)

    def learned_quantiles(self) -> dict[str, int]:
        """The same of the supervised tokens."""
        return quantiles(self.supervised)

    def supervised_quantiles(self) -> dict[str, float]:
        """Supervised share of samples."""
        if not len(self.lengths):
            return {}
        shares = self.supervised / np.maximum(self.lengths, 1)
        return {
            name: round(float(np.percentile(shares, share)), 3)
            for name, share in {"p5": 5, "median": 50, "p95": 95}.items()
        }

    def histogram(self, num_bars: int = NUM_BARS) -> list[tuple[int, int, int]]:
        """Bars of (from, below, samples) over token lengths, of widths that people can read."""
        return histogram(self.lengths, num_bars)

    def as_json(self) -> dict[str, Json]:
        """The report for programs."""
        findings = self.findings
        return {
            "template": self.template,
            "tokenizer": self.tokenizer,
            "sources": [asdict(source) for source in self.sources],
            "samples": self.num_samples,
            "errors": findings.num_errors,
            "warnings": findings.num_warnings,
            "counts": dict(findings.counts),
            "problems": {
                code: [asdict(problem) for problem in problems]
                for code, problems in findings.first.items()
            },
            "advice": {code: ADVICE[code] for code in findings.counts if code in ADVICE},
            "kinds": dict(self.kinds),
            "roles": dict(self.roles),
            "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
            "messages": {str(number): count for number, count in sorted(self.messages.items())},
            "without": dict(self.without),
            "languages": dict(self.languages.most_common()),
            "notes": dict(self.notes),
            "facts": list(self.facts),
            "tokens": self.num_tokens,
            "supervised_tokens": int(self.supervised.sum()),
            "supervised_share": round(self.supervised_share, 4),
            "supervised_share_of_samples": {**self.supervised_quantiles()},
            "length_tokens": {**self.quantiles()},
            "supervised_tokens_of_samples": {**self.learned_quantiles()},
            "histogram": [list(bar) for bar in self.histogram()],
            "max_length": self.max_length,
            "training_samples": self.training_samples,
            "training_tokens": self.training_tokens,
            "cost": asdict(self.cost) if self.cost else None,
        }


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def spoken_time(seconds: float) -> str:
    """A rough time in the unit that fits."""
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return counted(round(seconds / length), name)
    return counted(max(1, round(seconds / 10) * 10 if seconds > 20 else round(seconds)), "second")


PLURALS = {
    "Conversation": "conversations",
    "Completion": "prompts with completions",
    "Text": "raw texts",
    "Preference": "preference pairs",
    "Rated": "rated answers",
    "Labeled": "texts with labels",
}


def contents(report: CheckReport) -> list[tuple[str, str]]:
    """What is in the data, as (name, text) to be shown in a row each."""
    rows: list[tuple[str, str]] = []
    if len(report.kinds) > 1 or not report.roles:
        rows.append(("kinds", _listed({PLURALS[kind]: n for kind, n in report.kinds.items()})))
    if report.roles:
        rows.append(("roles", _listed(report.roles) + _absent(report)))
        rows.append(("messages", _spread(report.messages, "message")))
    if set(report.turns) - {1}:
        rows.append(("answers", _spread(report.turns, "answer")))
    rows.append(("languages", _listed(report.languages)))
    if report.supervised_share < 1 and len(report.lengths):
        rows.append(("supervised", f"{named(report.learned_quantiles())} tokens of a sample"))
        shares = {name: f"{share:.0%}" for name, share in report.supervised_quantiles().items()}
        rows.append(("", ", ".join(f"{k} {v}" for k, v in shares.items()) + " of its tokens"))
    return [(name, text) for name, text in rows if text]


def _absent(report: CheckReport) -> str:
    """What some conversations lack; no system message anywhere is no surprise."""
    lacking = {
        noun: report.without[role]
        for role, noun in (("system", "a system message"), ("user", "a question"))
        if report.roles[role] and report.without[role]
    }
    return "".join(f"; {counted(n, 'sample')} without {noun}" for noun, n in lacking.items())


def _listed(counts: Mapping[str, int]) -> str:
    ranked = Counter(counts).most_common()
    shown = ", ".join(f"{name} {count:,}" for name, count in ranked[:8])
    return f"{shown} and {len(ranked) - 8} more" if len(ranked) > 8 else shown


def named(numbers: Mapping[str, int]) -> str:
    """Numbers behind their names."""
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def _spread(counts: Counter[int], noun: str) -> str:
    """How many samples have how many of something, the commonest numbers first."""
    ranked = counts.most_common()
    if not ranked:
        return ""
    if len(ranked) == 1:
        return f"{counted(ranked[0][0], noun)} in each sample"
    (number, count), *others = sorted(ranked[:6])
    shown = [f"{number} (in {counted(count, 'sample')})"]
    shown += [f"{number} (in {count:,})" for number, count in others]
    longest = f", at most {max(counts)}" if len(ranked) > 6 else ""
    return ", ".join(shown) + longest


def quantiles(values: npt.NDArray[np.int64]) -> dict[str, int]:
    """Where most values lie, and the mean; empty without values."""
    if not len(values):
        return {}
    names = {"p5": 5, "median": 50, "p95": 95, "longest": 100}
    found = {name: int(np.percentile(values, share)) for name, share in names.items()}
    return {**found, "mean": round(float(values.mean()))}


def histogram(
    values: Sequence[int] | npt.NDArray[np.int64], num_bars: int = NUM_BARS
) -> list[tuple[int, int, int]]:
    """Bars of equal width in steps of 1, 2 or 5 times a power of ten; the outer ones hold outliers.

    A few very short or long samples would squeeze all others into one bar.
    """
    if not len(values):
        return []
    array = np.asarray(values)
    least, low, usual, high, most = np.percentile(
        array, (0, 5, 95, 99, 100), method="lower"
    ).tolist()
    bottom = max(least, low - 2 * (usual - low))
    top = max(min(high, usual + 2 * (usual - low)), bottom)
    rough = max((top - bottom) / num_bars, 1)
    power = 10 ** int(np.floor(np.log10(rough)))
    width = next(int(step * power) for step in (1, 2, 5, 10) if step * power >= rough)
    first, last = int(bottom // width), int(top // width)
    places = np.clip(array // width, first, last) - first
    counts = np.bincount(places, minlength=last - first + 1).tolist()
    starts = [width * index for index in range(first, last + 1)]
    stops = [*starts[1:], max(int(most) + 1, width * (last + 1))]
    starts[0] = min(starts[0], int(least))
    return list(zip(starts, stops, counts, strict=True))
