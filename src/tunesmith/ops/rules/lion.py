"""Lion: the sign of a mean (arXiv 2302.06675, algorithm 2).

    c = beta1 m + (1 - beta1) g;   w <- w - eta (sign(c) + lambda w);   m <- beta2 m + (1 - beta2) g

Every number moves by the learning rate, so that is 3 to 10 times smaller than AdamW's (§5 there).

Shape letters: P numbers in a part of a flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update
from tunesmith.ops.optim_states import Moment, StateKind, moment_tensors, new_moment, store


@dataclass(frozen=True)
class LionSettings:
    """What defines the update.

    Args:
        beta1: weight of the memory in the update.
        beta2: memory of the gradient.
        states: numbers in which it is kept.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    states: StateKind = "float32"


@dataclass(frozen=True)
class Lion:
    """The rule of a group, with the mean of its gradients."""

    settings: LionSettings
    mean: Moment

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, in parts."""
        settings, rate = self.settings, update.learning_rate
        for part in group.slices:
            gradient_P, mean_P = group.gradient_F[part].float(), self.mean.read(part)
            sign_P = mean_P.lerp(gradient_P, 1 - settings.beta1).sign_()
            weights_P = group.weights_F[part].float() * (1 - rate * group.weight_decay)
            mean_P = mean_P.lerp(gradient_P, 1 - settings.beta2)
            self.mean.write(part, mean_P, update.is_kept, update.generator)
            weights_P.add_(sign_P, alpha=-rate)
            store(group.weights_F[part], weights_P, update.is_kept, update.generator)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`exp_avg`."""
        return moment_tensors(self.mean, "exp_avg", layout.parts)


@dataclass(frozen=True)
class NewLion:
    """Makes Lion for a group."""

    settings: LionSettings

    def __call__(self, layout: Layout) -> Lion:
        """A mean of zeros."""
        mean = new_moment(self.settings.states, layout.size, layout.device, is_signed=True)
        return Lion(self.settings, mean)
