"""What a metric is, and what its user can set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tunesmith.errors import UserError
from tunesmith.evaluate.intervals import RESAMPLES, Measured
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Better
from tunesmith.types import Reporter, SilentReporter

T = TypeVar("T")

SourceRule = Literal["auto", "message", "after-first-line", "last-paragraph", "last-line", "colon"]


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What changes how predictions are measured.

    Args:
        resamples: of the bootstrap.
        seed: of the same.
        positive_class: of two labels the one that precision, recall and AUROC are about; auto
            knows it of yes and no, true and false, positive and negative, 1 and 0.
        betas: of F-beta, for two labels.
        labels: all labels that there are; those of the data if empty.
        schema: a JSON schema that answers have to fit.
        source: where the sentence to be corrected stands in the user's last message.
        source_pattern: a regular expression, instead; its first group is the sentence.
        tests: tests in Python by the id of the prediction, where they are not its label.
        allows_code: whether what the model wrote may be run.
        code_seconds: that a program and its tests may take.
        code_bytes: of memory that they may take.
        reporter: shows bars.
    """

    resamples: int = RESAMPLES
    seed: int = 0
    positive_class: str | None = None
    betas: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    source: SourceRule = "auto"
    source_pattern: str | None = None
    tests: Mapping[str, str] = field(default_factory=dict[str, str])
    allows_code: bool = False
    code_seconds: float = 10.0
    code_bytes: int = 1 << 30
    reporter: Reporter = field(default_factory=SilentReporter)


Measure = Callable[[Sequence[Prediction], MeasureOptions], list[Measured]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the registry: a metric, or several that are found together.

    Args:
        name: of the entry.
        scores: the names of its figures, with their directions; `f*` stands for `f1`, `f0.5`...
        says: what the figures say.
        fits: data that it is for.
        limits: of the figures' range.
        needs: labels, or nothing but answers.
        measure: finds the figures.
        reads_thinking: whether it sees a model's thinking, too; labels hold none.
    """

    name: str
    scores: Mapping[str, Better]
    says: str
    fits: str
    limits: str
    needs: Literal["answers", "labels"]
    measure: Measure
    reads_thinking: bool = False


def missing_library(metric: str, library: str, extra: str) -> UserError:
    """The error for a library that is not part of the core."""
    return UserError(
        "evaluate.library",
        f"metric {metric}",
        found=f"no {library}",
        expected=f"{library} to be installed",
        try_=f"pip install 'tunesmith[{extra}]'",
    )


def per_row(predictions: Sequence[Prediction], measure: Callable[[str, str], T]) -> list[T | None]:
    """A figure of each answer and its label; None without a label."""
    return [
        None if each.label is None else measure(each.prediction, each.label) for each in predictions
    ]
