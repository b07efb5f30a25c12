"""Adafactor: a second moment of rank 1, and steps relative to the weights (arXiv 1804.04235).

Algorithms 4 and 6 there, without a first moment, as torch.optim.Adafactor:

    rho = min(eta, 1/sqrt t);   alpha = max(floor, RMS(W)) rho;   beta = 1 - t^decay
    r <- beta r + (1 - beta) row means of G^2;   c likewise of columns;   V = r c / mean(r)
    U = G / sqrt V;   W <- (1 - eta lambda) W - alpha U / max(1, RMS(U) / d)

A learning rate is a share of the weights' own size: 1e-3 changes them by about a thousandth. A
vector keeps its whole second moment.

Shape letters: K all sides of a tensor but the last two, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update
from tunesmith.ops.optim_states import store


@dataclass(frozen=True)
class AdafactorSettings:
    """What defines the update.

    Args:
        decay: exponent of the forgetting, below 0: `decay` above.
        clip: largest root mean square of an update before the learning rate: d.
        floor: smallest size that weights count with.
        epsilon: smallest root of the second moment.
    """

    decay: float = -0.8
    clip: float = 1.0
    floor: float = 1e-3
    epsilon: float = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Adafactor:
    """The rule of a group; of each parameter the means of rows and columns, or the whole."""

    settings: AdafactorSettings
    states: Sequence[tuple[torch.Tensor, ...]]

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, parameter by parameter."""
        rate = update.learning_rate
        for (_, parameter, place), state in zip(group.layout.parts, self.states, strict=True):
            weights_KRC = group.weights_F[place].float().view(parameter.shape)
            gradient_KRC = group.gradient_F[place].float().view(parameter.shape)
            second_KRC = self._second_moment(gradient_KRC, state, update)
            step_KRC = second_KRC.clamp_(min=self.settings.epsilon**2).rsqrt_().mul_(gradient_KRC)
            alpha = root_mean_square(weights_KRC).clamp(min=self.settings.floor)
            alpha = alpha * min(rate, 1 / math.sqrt(update.number))
            excess = (root_mean_square(step_KRC) / self.settings.clip).clamp(min=1.0)
            weights_KRC = weights_KRC * (1 - rate * group.weight_decay)
            weights_KRC.sub_(step_KRC.mul_(alpha / excess))
            store(group.weights_F[place], weights_KRC.view(-1), update.is_kept, update.generator)

    def _second_moment(
        self, gradient_KRC: torch.Tensor, state: tuple[torch.Tensor, ...], update: Update
    ) -> torch.Tensor:
        """The new one, a tensor of its own; it is kept, unless the update is left out."""
        forgetting = update.number**self.settings.decay
        if len(state) == 1:
            means = (gradient_KRC.square(),)
        else:
            means = tuple(mean_square(gradient_KRC, dim=dim) for dim in (-1, -2))
        new = tuple(old.lerp(m, forgetting) for old, m in zip(state, means, strict=True))
        for old, value in zip(state, new, strict=True):
            store(old, value, update.is_kept, update.generator)
        if len(new) == 1:
            return new[0].clone()
        row_KR1, column_K1C = new
        mean_K11 = row_KR1.mean(-2, keepdim=True).clamp_(min=self.settings.epsilon)
        return (row_KR1 @ column_K1C).div_(mean_K11)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`row` and `column`, or `exp_avg_sq` of a vector."""
        for name, state in zip(layout.names, self.states, strict=True):
            fields = ("exp_avg_sq",) if len(state) == 1 else ("row", "column")
            for field, tensor in zip(fields, state, strict=True):
                yield f"{name}.{field}", tensor


@dataclass(frozen=True)
class NewAdafactor:
    """Makes Adafactor for a group."""

    settings: AdafactorSettings

    def __call__(self, layout: Layout) -> Adafactor:
        """Second moments of zeros."""
        states: list[tuple[torch.Tensor, ...]] = []
        for parameter in layout.parameters:
            shapes = state_shapes(parameter.shape)
            states.append(tuple(torch.zeros(shape, device=layout.device) for shape in shapes))
        return Adafactor(self.settings, states)


def state_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Of what is remembered of a parameter."""
    if len(shape) < 2:
        return [tuple(shape)]
    *stack, rows, columns = shape
    return [(*stack, rows, 1), (*stack, 1, columns)]


def mean_square(values: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Along one side, which stays with size 1."""
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return norm.square_().div_(values.shape[dim])


def root_mean_square(values: torch.Tensor) -> torch.Tensor:
    """Of all numbers, a scalar."""
    return torch.linalg.vector_norm(values) / math.sqrt(values.numel())
