"""The optimizer of a run."""

from __future__ import annotations

import torch

from tunesmith.config.method import LoraConfig, Method
from tunesmith.config.recipe import TrainConfig
from tunesmith.ops.optim import AdamWSettings, FlatAdamW, build_flat_adamw


def build_optimizer(
    parameters: list[tuple[str, torch.nn.Parameter]],
    train: TrainConfig,
    method: Method | None = None,
) -> FlatAdamW:
    """AdamW (arXiv 1711.05101) as the recipe wants it; only matrices decay.

    Args:
        parameters: what is trained, already on its device; they become views of flat buffers.
        train: weight decay, seed, and `optimizer`.
        method: may give some parameters a learning rate of their own; None gives all the same.
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
    names = [name for name, _ in parameters]
    return build_flat_adamw(parameters, settings, rate_factors(names, method))


def rate_factors(names: list[str], method: Method | None) -> dict[str, float]:
    """Factors on the learning rate by parameter: LoRA+ (arXiv 2402.12354) gives one to all B."""
    if not isinstance(method, LoraConfig) or method.plus_ratio is None:
        return {}
    return {name: method.plus_ratio for name in names if ".lora_B." in name}
