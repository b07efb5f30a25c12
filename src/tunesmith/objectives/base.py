"""What an objective is; `objectives/__init__.py` lists them by name.

A new objective is one file with a class, and one line in OBJECTIVES there. Those to come have their
places here: ppo, grpo.

Shape letters: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class StepResult:
    """What an objective says about one micro-batch.

    `loss_sum` is a sum over supervised weight, not a mean: the loop divides it by the weight of the
    whole global batch, so that accumulation over micro-batches is exact. So are `metrics`, which
    an objective names in `metric_names`. `loss_N` are the losses of the supervised rows one by
    one, without their weights; None where rows have none of their own.
    """

    loss_sum: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    loss_N: torch.Tensor | None = None


class Objective(Protocol):
    """A pure function of model and batch.

    `metric_names` are the keys of its results' metrics. `group_size` is how many sequences of a
    sample it compares (2: chosen and rejected); 0 looks at tokens alone.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of the metrics, in the order they are read."""
        ...

    @property
    def group_size(self) -> int:
        """Sequences of a sample that belong together."""
        ...

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """Loss and metrics of one micro-batch; `batch` is on the model's device.

        A model in eval mode is being measured: what only helps training (label smoothing, z-loss)
        stays out of its loss, as dropout does.
        """
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """An objective whose loss depends on the whole step: on all of its micro-batches at once."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it does so."""
        ...

    def look_ahead(self, model: Any, batch: PackedBatch) -> torch.Tensor:
        """What a micro-batch adds to that, without gradients; `batch` is on the device."""
        ...

    def prepared(self, found: Sequence[torch.Tensor]) -> Objective:
        """The objective of one step, from what was found in its micro-batches."""
        ...


@runtime_checkable
class Summarizes(Protocol):
    """An objective whose figures are no means themselves, but come of some, such as an F1 score."""

    def summarized(self, means: Sequence[float]) -> dict[str, float]:
        """The figures to show, from the means of the metrics in their order."""
        ...


def figures(objective: Objective, means: Sequence[float]) -> dict[str, float]:
    """What an objective's metrics come to, by name."""
    if isinstance(objective, Summarizes):
        return objective.summarized(means)
    return dict(zip(objective.metric_names, means, strict=True))


@runtime_checkable
class BringsParameters(Protocol):
    """An objective with weights of its own, which are trained with the model's."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """These weights."""
        ...


def own_parameters(objective: Objective) -> list[tuple[str, torch.nn.Parameter]]:
    """What an objective trains besides the model."""
    return list(objective.named_parameters()) if isinstance(objective, BringsParameters) else []


class Trunk(Protocol):
    """Another way through the decoder, one that may skip layers whose result is known."""

    def decode(self, base: Any, batch: PackedBatch) -> torch.Tensor:
        """The decoder's last hidden states, `hidden_TH`; `base` is the model without adapters."""
        ...
