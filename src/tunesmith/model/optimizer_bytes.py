"""What an optimizer keeps besides the weights, computed from names and shapes, for plans."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch

from tunesmith.config.optimizer import (
    MATRIX_RULES,
    AdafactorConfig,
    AnyOptimizer,
    ApolloConfig,
    BadamConfig,
    GaloreConfig,
    LionConfig,
    MuonConfig,
    SgdConfig,
)
from tunesmith.ops.optim import is_hidden_matrix
from tunesmith.ops.optim_states import bytes_per_number
from tunesmith.ops.rules.adafactor import state_shapes

Shape = tuple[int, ...]
Trained = tuple[tuple[str, Shape], ...]


def trained_of(named: Iterable[tuple[str, torch.nn.Parameter]]) -> Trained:
    """Names and shapes of parameters."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in named)


def optimizer_bytes(trained: Trained, config: AnyOptimizer, *, is_bf16: bool) -> int:
    """Gradients, masters and states of all parameters; of the largest block, where one is trained.

    Args:
        trained: names and shapes.
        config: of the optimizer.
        is_bf16: whether weights are bfloat16.
    """
    gradient, master = 4, 0
    if is_bf16:
        gradient, master = (4, 4) if config.keep_master else (2, 0)

    def total(named: Sequence[tuple[str, Shape]]) -> float:
        return sum(
            math.prod(shape) * (gradient + master) + state_bytes(name, shape, config)
            for name, shape in named
        )

    blocks = _blocks(trained, outside=config.outside) if isinstance(config, BadamConfig) else []
    return round(max(map(total, blocks)) if blocks else total(trained))


def state_bytes(name: str, shape: Shape, config: AnyOptimizer) -> float:
    """What a rule remembers of one parameter."""
    count = math.prod(shape)
    if isinstance(config, AdafactorConfig):
        return 4.0 * sum(map(math.prod, state_shapes(shape)))
    if isinstance(config, LionConfig):
        return count * bytes_per_number(config.states)
    if isinstance(config, SgdConfig):
        return count * bytes_per_number(config.states) * (config.momentum > 0)
    if not isinstance(config, MATRIX_RULES):
        return 2 * count * bytes_per_number(config.states)
    is_low_rank = isinstance(config, GaloreConfig | ApolloConfig)
    states = "float32" if is_low_rank else config.states
    if not is_hidden_matrix(name, shape):
        return 2 * count * bytes_per_number(states)
    return _matrix_bytes(shape, config)


def _matrix_bytes(shape: Shape, config: MuonConfig | GaloreConfig | ApolloConfig) -> float:
    if isinstance(config, MuonConfig):
        return math.prod(shape) * bytes_per_number(config.states)
    small, large = sorted(shape)
    rank = min(config.rank, small)
    return 4.0 * (2 * rank * large + (rank * small if isinstance(config, GaloreConfig) else 1))


def _blocks(trained: Trained, *, outside: bool) -> list[list[tuple[str, Shape]]]:
    layers: dict[str, list[tuple[str, Shape]]] = {}
    for name, shape in trained:
        found = re.match(r"(.*?\.\d+)\.", name)
        if found or outside:
            layers.setdefault(found[1] if found else "", []).append((name, shape))
    return list(layers.values())
