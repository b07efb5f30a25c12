"""Classification on packed sequences: the last token of each tells its label.

Shape letters: N sequences (each has one supervised row, its last), C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, one_hot

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.reward import scores_at
from tunesmith.ops.measures import macro_f1
from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class ClassifyObjective:
    """Cross-entropy of the labels.

    Args:
        labels: their names, in the order of the head's rows.
        trunk: another way through the decoder; None is the model's own.
    """

    labels: Sequence[str]
    trunk: Trunk | None = None
    group_size: int = 0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The accuracy, then for each label what its F1 comes of."""
        parts = ("hits", "found", "there")
        return ("accuracy", *(f"{part}:{label}" for part in parts for label in self.labels))

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum` and metrics are sums over the sequences of the batch.

        `target_N` holds their labels' numbers.
        """
        logits_NC = scores_at(model, batch, batch.row_N, self.trunk)
        loss_N = cross_entropy(logits_NC, batch.target_N, reduction="none")
        count = len(self.labels)
        found_NC = one_hot(logits_NC.detach().argmax(1), count)
        there_NC = one_hot(batch.target_N, count)
        weight_N1 = batch.weight_N[:, None]
        hits_C, found_C, there_C = (
            (weight_N1 * each_NC).sum(0) for each_NC in (found_NC * there_NC, found_NC, there_NC)
        )
        values = torch.cat((hits_C.sum()[None], hits_C, found_C, there_C))
        return StepResult(
            loss_sum=(batch.weight_N.to(loss_N.dtype) * loss_N).sum(),
            metrics=dict(zip(self.metric_names, values.unbind(), strict=True)),
        )

    def summarized(self, means: Sequence[float]) -> dict[str, float]:
        """Accuracy and macro-F1, from the means of all metrics."""
        accuracy, *others = means
        count = len(self.labels)
        hits, found, there = (others[first : first + count] for first in (0, count, 2 * count))
        return {"accuracy": accuracy, "macro_f1": macro_f1(hits, found, there)}
