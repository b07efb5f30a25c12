"""GaLore: Adam in the main directions of the gradient (arXiv 2403.03507, algorithm 2).

    every T updates: U = first r singular vectors of G on its smaller side
    R = U^T G;   N = Adam(R);   W <- (1 - eta lambda) W - eta alpha U N

The moments belong to R: r times the larger side, in place of both sides multiplied. As in the
authors' galore_torch they stay as they are when U is renewed. Differences from it: U comes from the
eigenvectors of G G^T, which span the same space in a sixth of the time (576 x 1536); each is signed
so that its largest number is positive, where LAPACK's sign is arbitrary; weights decay before the
update, not after it. An update that is skipped makes no U: then the one after it does. Until one
of these two has made the first U, it is random.

Every T updates the host may wait for the device: eigenvectors are found step by step.

Shape letters: S the smaller side of a matrix, L its larger, R the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update, seed_from
from tunesmith.ops.optim_states import store
from tunesmith.ops.rules.adamw import AdamWSettings, adam_moments


@dataclass(frozen=True)
class GaloreSettings:
    """What defines the update.

    Args:
        adam: in the low-rank space; its moments are float32.
        rank: directions that are kept of each matrix.
        update_every: updates between two choices of them.
        scale: alpha, a factor on the learning rate.
    """

    adam: AdamWSettings
    rank: int = 128
    update_every: int = 200
    scale: float = 2.0


ATTEMPTS = 2
"""Updates at the beginning of a period that make a basis, unless the one before has."""


@dataclass(frozen=True)
class LowRankState:
    """What is remembered of one matrix; `period_1` is the number of its last basis."""

    basis_SR: torch.Tensor
    period_1: torch.Tensor
    first_RL: torch.Tensor
    second_RL: torch.Tensor


@dataclass(frozen=True)
class Galore:
    """The rule of a group of matrices, with a state for each."""

    settings: GaloreSettings
    states: Sequence[LowRankState]

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, matrix by matrix."""
        for (_, parameter, place), state in zip(group.layout.parts, self.states, strict=True):
            gradient_SL = lying(group.gradient_F[place].float().view(parameter.shape))
            delta_SL = self._direction(gradient_SL, state, update)
            weights_SL = lying(group.weights_F[place].float().view(parameter.shape))
            weights_SL = weights_SL * (1 - update.learning_rate * group.weight_decay)
            weights_SL = weights_SL - update.learning_rate * self.settings.scale * delta_SL
            weights_P = standing(weights_SL, parameter.shape).reshape(-1)
            store(group.weights_F[place], weights_P, update.is_kept, update.generator)

    def _direction(
        self, gradient_SL: torch.Tensor, state: LowRankState, update: Update
    ) -> torch.Tensor:
        period, place = divmod(update.number - 1, self.settings.update_every)
        if place < ATTEMPTS:
            basis_SR = main_directions(gradient_SL, state.basis_SR.shape[1])
            is_kept = update.is_kept | (state.period_1[0] >= period)
            store(state.basis_SR, basis_SR, is_kept, update.generator)
            number_1 = torch.full_like(state.period_1, period)
            store(state.period_1, number_1, is_kept, update.generator)
        adam = self.settings.adam
        first_RL, second_RL, root_RL = adam_moments(
            state.basis_SR.T @ gradient_SL, (state.first_RL, state.second_RL), adam, update.number
        )
        store(state.first_RL, first_RL, update.is_kept, update.generator)
        store(state.second_RL, second_RL, update.is_kept, update.generator)
        return state.basis_SR @ (first_RL / root_RL / (1 - adam.beta1**update.number))

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`basis`, `period`, `exp_avg` and `exp_avg_sq`."""
        for name, state in zip(layout.names, self.states, strict=True):
            yield f"{name}.basis", state.basis_SR
            yield f"{name}.period", state.period_1
            yield f"{name}.exp_avg", state.first_RL
            yield f"{name}.exp_avg_sq", state.second_RL


@dataclass(frozen=True)
class NewGalore:
    """Makes GaLore for a group."""

    settings: GaloreSettings
    seed: int

    def __call__(self, layout: Layout) -> Galore:
        """Moments of zeros, random bases."""
        states: list[LowRankState] = []
        for name, parameter in zip(layout.names, layout.parameters, strict=True):
            small, large = sorted(parameter.shape)
            rank = min(self.settings.rank, small)
            generator = torch.Generator().manual_seed(seed_from("basis", self.seed, name))
            basis_SR = torch.linalg.qr(torch.randn(small, rank, generator=generator))[0]
            moments = torch.zeros(2, rank, large, device=layout.device)
            # Column by column as LAPACK leaves it; files want rows.
            basis_SR = basis_SR.contiguous().to(layout.device)
            period_1 = torch.full((1,), -1.0, device=layout.device)
            states.append(LowRankState(basis_SR, period_1, moments[0], moments[1]))
        return Galore(self.settings, states)


def lying(matrix_RC: torch.Tensor) -> torch.Tensor:
    """A view whose rows are the smaller side; of a square matrix its columns, as in the paper."""
    return matrix_RC.T if matrix_RC.shape[0] >= matrix_RC.shape[1] else matrix_RC


def standing(matrix_SL: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A view of the shape that `lying` was given."""
    return matrix_SL.T if shape[0] >= shape[1] else matrix_SL


def main_directions(gradient_SL: torch.Tensor, rank: int) -> torch.Tensor:
    """The first left singular vectors, `SR`, by eigenvectors of the Gram matrix.

    Numbers that are not finite, for which there are none, count as 0: who asks does not use the
    result then.
    """
    gradient_SL = gradient_SL.nan_to_num(0.0, 0.0, 0.0)
    # Squares of small gradients would be below the smallest float32.
    gradient_SL = gradient_SL / gradient_SL.abs().max().clamp(min=1e-30)
    vectors_SS = torch.linalg.eigh(gradient_SL @ gradient_SL.T)[1]
    vectors_SR = vectors_SS.flip(1)[:, :rank]
    largest_1R = vectors_SR.gather(0, vectors_SR.abs().argmax(0, keepdim=True))
    return vectors_SR * torch.where(largest_1R < 0, -1.0, 1.0)
