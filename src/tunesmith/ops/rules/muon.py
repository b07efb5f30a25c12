"""Muon: momentum made orthogonal (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

    B <- mu B + (1 - mu) G;   O = NewtonSchulz((1 - mu) G + mu B)        (Nesterov)
    W <- (1 - eta lambda) W - eta 0.2 sqrt(max(rows, columns)) O

The factor 0.2 sqrt(max) gives O the root mean square of AdamW's updates (arXiv 2502.16982, eq. 4),
so AdamW's learning rates and decays suit it. torch.optim.Muon(adjust_lr_fn="match_rms_adamw") is
the same, but that it always multiplies in bfloat16: here a matrix does so in its own type, float32
or bfloat16, and the momentum stays float32 for both.

It is for matrices that map hidden states to hidden states; other parameters go to AdamW.

Shape letters: R rows, C columns; S the smaller side, L the larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update
from tunesmith.ops.optim_states import Moment, StateKind, moment_tensors, new_moment, store

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is steepest at 0: small singular values grow fast, and all end in 0.7 to
1.2, which is as good as 1 (Keller Jordan)."""

ADAMW_RMS = 0.2
"""Of AdamW's updates at a learning rate of 1 (arXiv 2502.16982, §2.2: 0.2 to 0.4)."""


@dataclass(frozen=True)
class MuonSettings:
    """What defines the update.

    Args:
        momentum: memory of the gradient.
        iterations: of Newton-Schulz.
        states: numbers in which the momentum is kept.
    """

    momentum: float = 0.95
    iterations: int = 5
    states: StateKind = "float32"


@dataclass(frozen=True)
class Muon:
    """The rule of a group of matrices, with the mean of their gradients."""

    settings: MuonSettings
    mean: Moment

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, matrix by matrix."""
        settings, kept = self.settings, (update.is_kept, update.generator)
        for _, parameter, place in group.layout.parts:
            gradient_P = group.gradient_F[place].float()
            mean_P = self.mean.read(place).lerp(gradient_P, 1 - settings.momentum)
            mixed_RC = gradient_P.lerp(mean_P, settings.momentum).view(parameter.shape)
            self.mean.write(place, mean_P, *kept)
            direction_RC = orthogonalize(mixed_RC.to(parameter.dtype), settings.iterations)
            weights_P = group.weights_F[place].float()
            weights_P = weights_P * (1 - update.learning_rate * group.weight_decay)
            rate = update.learning_rate * ADAMW_RMS * math.sqrt(max(parameter.shape))
            weights_P.add_(direction_RC.float().reshape(-1), alpha=-rate)
            store(group.weights_F[place], weights_P, *kept)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`momentum`."""
        return moment_tensors(self.mean, "momentum", layout.parts)


@dataclass(frozen=True)
class NewMuon:
    """Makes Muon for a group."""

    settings: MuonSettings

    def __call__(self, layout: Layout) -> Muon:
        """A mean of zeros."""
        mean = new_moment(self.settings.states, layout.size, layout.device, is_signed=True)
        return Muon(self.settings, mean)


def orthogonalize(matrix_RC: torch.Tensor, iterations: int) -> torch.Tensor:
    """The nearest matrix with all singular values 1, roughly, by the quintic Newton-Schulz.

        X <- a X + (b A + c A A) X,   A = X X^T

    Returns:
        `RC`, in the type of the matrix, in which all products are.
    """
    a, b, c = COEFFICIENTS
    rows, columns = matrix_RC.shape
    x_SL = matrix_RC.T if rows > columns else matrix_RC
    # The Frobenius norm is no less than the largest singular value, which must not be above 1.
    x_SL = x_SL / x_SL.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram_SS = x_SL @ x_SL.T
        x_SL = torch.addmm(
            x_SL, torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c), x_SL, beta=a
        )
    return x_SL.T if rows > columns else x_SL
