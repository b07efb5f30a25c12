"""Stochastic gradient descent with heavy-ball momentum, as torch.optim.SGD.

    b <- mu b + g;   w <- (1 - eta lambda) w - eta b

Weight decay is decoupled here; torch adds it to the gradient.

Shape letters: P numbers in a part of a flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update
from tunesmith.ops.optim_states import Moment, StateKind, moment_tensors, new_moment, store


@dataclass(frozen=True)
class SgdSettings:
    """What defines the update.

    Args:
        momentum: share of the last step that is taken again; 0 keeps nothing.
        states: numbers in which it is kept.
    """

    momentum: float = 0.9
    states: StateKind = "float32"


@dataclass(frozen=True)
class Sgd:
    """The rule of a group; `steps` are the sums of its gradients, None without momentum."""

    settings: SgdSettings
    steps: Moment | None

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, in parts."""
        rate = update.learning_rate
        for part in group.slices:
            step_P = group.gradient_F[part].float()
            if self.steps is not None:
                step_P = step_P + self.settings.momentum * self.steps.read(part)
                self.steps.write(part, step_P, update.is_kept, update.generator)
            weights_P = group.weights_F[part].float() * (1 - rate * group.weight_decay)
            weights_P.add_(step_P, alpha=-rate)
            store(group.weights_F[part], weights_P, update.is_kept, update.generator)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`momentum`, if there is any."""
        if self.steps is not None:
            yield from moment_tensors(self.steps, "momentum", layout.parts)


@dataclass(frozen=True)
class NewSgd:
    """Makes SGD for a group."""

    settings: SgdSettings

    def __call__(self, layout: Layout) -> Sgd:
        """Sums of zeros, or none."""
        if not self.settings.momentum:
            return Sgd(self.settings, None)
        steps = new_moment(self.settings.states, layout.size, layout.device, is_signed=True)
        return Sgd(self.settings, steps)
