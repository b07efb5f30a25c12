"""AdamW (arXiv 1711.05101, algorithm 2) on flat buffers.

What torch's own `AdamW(fused=True)` does to separate parameters, this does to the same bits: an
elementwise update does not depend on how its elements are grouped. On CPU all but the last
`numel % 16` elements of a parameter: torch computes those without vector instructions, which may
round the last bit otherwise.

    weights      states      kept for each parameter besides its weight        update
    float32      float32     4 gradient, 8 moments                             torch's fused kernel
    bfloat16     float32     4 gradient, 4 master, 8 moments                   torch's fused kernel
    bfloat16     int8        4 gradient, 4 master, 2.03 moments                in parts
    bfloat16     bfloat16    2 gradient, 4 moments, no master                  in parts

Shape letters: P numbers in a part of a flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from tunesmith.ops.optim import (
    Assignment,
    FlatGroup,
    FlatOptimizer,
    FlatSettings,
    Layout,
    NamedParameter,
    Update,
    build_flat,
)
from tunesmith.ops.optim_states import (
    Moment,
    PlainMoment,
    StateKind,
    moment_tensors,
    new_moment,
    store,
)


@dataclass(frozen=True)
class AdamWSettings:
    """What defines the update.

    Args:
        beta1: memory of the first moment.
        beta2: memory of the second moment.
        epsilon: added to the root of the second moment.
        states: numbers in which the moments are kept.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    states: StateKind = "float32"


@dataclass(frozen=True)
class AdamW:
    """The rule of a group, with both moments of all its parameters."""

    settings: AdamWSettings
    first: Moment
    second: Moment

    def step(self, group: FlatGroup, update: Update) -> None:
        """One update; by torch's fused kernel where all numbers are float32, as it wants."""
        buffers = [m.values for m in (self.first, self.second) if isinstance(m, PlainMoment)]
        types = {buffer.dtype for buffer in (group.weights_F, *buffers)}
        if len(buffers) == 2 and types == {torch.float32}:
            self._step_fused(group, update, buffers)
        else:
            self._step_in_parts(group, update)

    def _step_fused(
        self, group: FlatGroup, update: Update, moments: Sequence[torch.Tensor]
    ) -> None:
        is_skipped = update.is_kept.float()
        adamw(
            [group.weights_F],
            [group.gradient_F],
            [moments[0]],
            [moments[1]],
            [],
            # The kernel counts this one up itself.
            [torch.full_like(is_skipped, update.number - 1)],
            fused=True,
            found_inf=is_skipped,
            amsgrad=False,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            lr=update.learning_rate,
            weight_decay=group.weight_decay,
            eps=self.settings.epsilon,
            maximize=False,
        )

    def _step_in_parts(self, group: FlatGroup, update: Update) -> None:
        kept = (update.is_kept, update.generator)
        for part in group.slices:
            weights_P, first_P, second_P = adamw_update(
                group.weights_F[part].float(),
                group.gradient_F[part].float(),
                (self.first.read(part), self.second.read(part)),
                self.settings,
                learning_rate=update.learning_rate,
                weight_decay=group.weight_decay,
                num_updates=update.number,
            )
            self.first.write(part, first_P, *kept)
            self.second.write(part, second_P, *kept)
            store(group.weights_F[part], weights_P, *kept)

    def tensors(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """`exp_avg` and `exp_avg_sq`."""
        yield from moment_tensors(self.first, "exp_avg", layout.parts)
        yield from moment_tensors(self.second, "exp_avg_sq", layout.parts)


def adamw_update(
    weights_P: torch.Tensor,
    gradient_P: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    settings: AdamWSettings,
    *,
    learning_rate: float,
    weight_decay: float,
    num_updates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW written out, all in float32.

    Returns:
        (weights, first moment, second moment) after update number `num_updates`, counted from 1.
    """
    first_P, second_P, root_P = adam_moments(gradient_P, moments, settings, num_updates)
    weights_P = weights_P * (1 - learning_rate * weight_decay)
    correction = 1 - settings.beta1**num_updates
    weights_P.addcdiv_(first_P, root_P, value=-learning_rate / correction)
    return weights_P, first_P, second_P


def adam_moments(
    gradient_P: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    settings: AdamWSettings,
    num_updates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The moments of Adam (arXiv 1412.6980, algorithm 1), of numbers in any shape.

    Returns:
        (first moment, second moment, and what the first one is divided by: the root of the second
        one, corrected, and epsilon) of update number `num_updates`, counted from 1.
    """
    first_P, second_P = moments
    first_P = first_P.lerp(gradient_P, 1 - settings.beta1)
    second_P = (second_P * settings.beta2).addcmul_(
        gradient_P, gradient_P, value=1 - settings.beta2
    )
    root_P = (second_P / (1 - settings.beta2**num_updates)).sqrt_().add_(settings.epsilon)
    return first_P, second_P, root_P


@dataclass(frozen=True)
class NewAdamW:
    """Makes AdamW for a group."""

    settings: AdamWSettings

    def __call__(self, layout: Layout) -> AdamW:
        """Moments of zeros."""
        states, size, device = self.settings.states, layout.size, layout.device
        return AdamW(
            self.settings,
            new_moment(states, size, device, is_signed=True),
            new_moment(states, size, device, is_signed=False),
        )


def build_flat_adamw(
    named: Sequence[NamedParameter],
    adamw_settings: AdamWSettings,
    settings: FlatSettings,
    rate_factors: Mapping[str, float] | None = None,
) -> FlatOptimizer:
    """AdamW for all parameters; see `build_flat`."""
    return build_flat([Assignment(named, NewAdamW(adamw_settings))], settings, rate_factors)
