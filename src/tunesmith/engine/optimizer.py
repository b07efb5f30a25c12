"""The optimizer of a run."""

from __future__ import annotations

import torch

from tunesmith.config.recipe import TrainConfig
from tunesmith.ops.optim import AdamWSettings, FlatAdamW, build_flat_adamw


def build_optimizer(
    parameters: list[tuple[str, torch.nn.Parameter]], train: TrainConfig
) -> FlatAdamW:
    """AdamW (arXiv 1711.05101) as the recipe wants it; only matrices decay.

    Args:
        parameters: what is trained, already on its device; they become views of flat buffers.
        train: weight decay, seed, and `optimizer`.
    """
    optimizer = train.optimizer
    settings = AdamWSettings(
        weight_decay=train.weight_decay,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        states=optimizer.states,
        keep_master=optimizer.keep_master,
        seed=train.seed,
    )
    return build_flat_adamw(parameters, settings)
