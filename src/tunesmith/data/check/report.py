"""What a check found, as plain data: printed, drawn, or written as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def quantiles(values: npt.NDArray[np.int64]) -> dict[str, int]:
    """Where most values lie, and the mean; empty without values."""
    if not len(values):
        return {}
    names = {"shortest": 0, "p5": 5, "median": 50, "p95": 95, "longest": 100}
    found = {name: int(np.percentile(values, share)) for name, share in names.items()}
    return {**found, "mean": round(float(values.mean()))}


def histogram(
    values: Sequence[int] | npt.NDArray[np.int64], num_bars: int = NUM_BARS
) -> list[tuple[int, int, int]]:
    """Bars of equal width in steps of 1, 2 or 5 times a power of ten, the last one open."""
    if not len(values):
        return []
    array = np.asarray(values)
    # A few very long samples would squeeze all others into one bar: they share the last one.
    low, usual, high = np.percentile(array, (5, 95, 99), method="lower").tolist()
    top = max(min(high, usual + 2 * (usual - low)) * 1.1, 10.0)
    rough = top / num_bars
    power = 10 ** int(np.floor(np.log10(max(rough, 1))))
    width = next(int(step * power) for step in (1, 2, 5, 10) if step * power >= rough)
    edges = [width * index for index in range(int(top // width) + 1)]
    places = np.minimum(array // width, len(edges) - 1)
    counts = np.bincount(places, minlength=len(edges))
    stops = [*edges[1:], max(int(array.max()) + 1, edges[-1] + width)]
    return [
        (start, stop, int(count)) for start, stop, count in zip(edges, stops, counts, strict=True)
    ]
