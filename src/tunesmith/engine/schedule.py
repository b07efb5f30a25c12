"""The learning rate of any step, as a pure function."""

from __future__ import annotations

import math

from tunesmith.config.recipe import TrainConfig


def warmup_steps(train: TrainConfig, num_steps: int) -> int:
    """Steps of the warm-up: below 1 a share of all steps, else a number."""
    wanted = math.ceil(train.warmup * num_steps) if train.warmup < 1 else int(train.warmup)
    return min(wanted, num_steps)


def learning_rate_at(train: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0.

    Rises linearly over the warm-up and reaches its peak at the warm-up's last step, then falls to
    near 0 at the last step (cosine: Loshchilov and Hutter, arXiv 1608.03983, eq. 5), or stays.
    """
    if train.learning_rate == "auto":
        raise ValueError("resolve the recipe before asking for its learning rate")
    peak = train.learning_rate
    warmup = warmup_steps(train, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    if train.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if train.schedule == "linear":
        return peak * (1 - done)
    return peak
