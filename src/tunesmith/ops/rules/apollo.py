"""APOLLO: gradients scaled as AdamW would, seen in a random projection (arXiv 2412.05270).

Algorithm 1 there:

    R = P G, P ~ N(0, 1/r) drawn anew every T updates;  M, V = moments of R;  N = M / (sqrt V + e)
    s_j = |N_:j| / |R_:j| for each channel j of the larger side, or |N| / |R| for the whole matrix
    W <- (1 - eta lambda) W - eta c sqrt(scale) limit(G diag(s))
    c = sqrt(1 - beta2^t) / (1 - beta1^t)

limit() lets the norm grow by at most 1 % an update (Fira, arXiv 2410.01623). APOLLO-Mini has rank
1, one factor for each matrix, and scale 128. P is not kept: a seed makes it again. It computes the
numbers of the authors' apollo_torch, with three differences: P is drawn from other seeds, weights
decay before the update, and after a gradient of 0 the norm is not limited (there it would stay near
0 for ever).

Shape letters: S the smaller side of a matrix, L its larger, R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tunesmith.ops.optim import FlatGroup, Layout, Update, seed_from
from tunesmith.ops.optim_states import store
from tunesmith.ops.rules.adamw import AdamWSettings
from tunesmith.ops.rules.galore import lying, standing

MOST_GROWTH = 1.01
"""Of the norm of an update over that of the one before."""


@dataclass(frozen=True)
class ApolloSettings:
    """What defines the update.

    Args:
        adam: in the projection; its moments are float32.
        rank: of the projection.
        update_every: updates between two projections.
        scale: its root is a factor on the learning rate.
        is_by_channel: a factor for each channel, else for each matrix.
    """

    adam: AdamWSettings
    rank: int = 256
    update_every: int = 200
    scale: float = 1.0
    is_by_channel: bool = True


@dataclass(frozen=True)
class ApolloState:
    """What is remembered of one matrix; `norm` is that of the last update, 0 if there is none."""

    first_RL: torch.Tensor
    second_RL: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class Apollo:
    """The rule of a group of matrices, with a state for each."""

    settings: ApolloSettings
    seed: int
    states: Sequence[ApolloState]

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update, matrix by matrix."""
        adam, number = self.settings.adam, update.number
        correction = math.sqrt(1 - adam.beta2**number) / (1 - adam.beta1**number)
        rate = update.learning_rate * math.sqrt(self.settings.scale) * correction
        for (name, parameter, place), state in zip(group.layout.parts, self.states, strict=True):
            gradient_SL = lying(group.gradient_F[place].float().view(parameter.shape))
            projection_RS = self._projection(name, gradient_SL, state, number)
            delta_SL = self._scaled(gradient_SL, projection_RS @ gradient_SL, state, update)
            weights_SL = lying(group.weights_F[place].float().view(parameter.shape))
            weights_SL = weights_SL * (1 - update.learning_rate * group.weight_decay)
            weights_SL = weights_SL - rate * delta_SL
            weights_P = standing(weights_SL, parameter.shape).reshape(-1)
            store(group.weights_F[place], weights_P, update.is_kept, update.generator)

    def _projection(
        self, name: str, gradient_SL: torch.Tensor, state: ApolloState, number: int
    ) -> torch.Tensor:
        period = (number - 1) // self.settings.update_every
        seed = seed_from("projection", self.seed, name, period)
        return projection(state.first_RL.shape[0], gradient_SL, seed)

    def _scaled(
        self, gradient_SL: torch.Tensor, low_RL: torch.Tensor, state: ApolloState, update: Update
    ) -> torch.Tensor:
        adam, kept = self.settings.adam, (update.is_kept, update.generator)
        first_RL = state.first_RL.lerp(low_RL, 1 - adam.beta1)
        second_RL = (state.second_RL * adam.beta2).addcmul_(low_RL, low_RL, value=1 - adam.beta2)
        normal_RL = first_RL / (second_RL.sqrt() + adam.epsilon)
        along = 0 if self.settings.is_by_channel else (0, 1)
        before, after = (torch.linalg.vector_norm(x, dim=along) for x in (low_RL, normal_RL))
        scaled_SL = gradient_SL * (after / (before + 1e-8))
        norm = torch.linalg.vector_norm(scaled_SL)
        excess = (norm / (state.norm + 1e-8)).clamp(min=MOST_GROWTH) / MOST_GROWTH
        excess = torch.where(state.norm > 0, excess, 1.0)
        store(state.first_RL, first_RL, *kept)
        store(state.second_RL, second_RL, *kept)
        store(state.norm, norm / excess, *kept)
        return scaled_SL / excess

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`exp_avg`, `exp_avg_sq` and `norm`."""
        for name, state in zip(layout.names, self.states, strict=True):
            yield f"{name}.exp_avg", state.first_RL
            yield f"{name}.exp_avg_sq", state.second_RL
            yield f"{name}.norm", state.norm


@dataclass(frozen=True)
class NewApollo:
    """Makes APOLLO for a group."""

    settings: ApolloSettings
    seed: int

    def __call__(self, layout: Layout) -> Apollo:
        """Moments of zeros."""
        states: list[ApolloState] = []
        for parameter in layout.parameters:
            small, large = sorted(parameter.shape)
            rank = min(self.settings.rank, small)
            moments = torch.zeros(2, rank, large, device=layout.device)
            norm = torch.zeros((), device=layout.device)
            states.append(ApolloState(moments[0], moments[1], norm))
        return Apollo(self.settings, self.seed, states)


def projection(rank: int, gradient_SL: torch.Tensor, seed: int) -> torch.Tensor:
    """A random projection for a gradient, `RS`, of variance 1/r, drawn on its device."""
    generator = torch.Generator(gradient_SL.device).manual_seed(seed)
    shape = (rank, gradient_SL.shape[0])
    drawn_RS = torch.randn(shape, generator=generator, device=gradient_SL.device)
    return drawn_RS / math.sqrt(rank)
