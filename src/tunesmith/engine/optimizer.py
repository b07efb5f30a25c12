"""The optimizer of a run, from its recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from tunesmith.config.method import LoraConfig, Method
from tunesmith.config.optimizer import (
    AdafactorConfig,
    AdamWConfig,
    AnyOptimizer,
    ApolloConfig,
    BadamConfig,
    GaloreConfig,
    LionConfig,
    MuonConfig,
    SgdConfig,
)
from tunesmith.config.recipe import TrainConfig
from tunesmith.errors import RecipeError
from tunesmith.ops.optim import (
    Assignment,
    FlatSettings,
    NamedParameter,
    NewRule,
    Optimizer,
    build_flat,
    is_hidden_matrix,
)
from tunesmith.ops.rules.adafactor import AdafactorSettings, NewAdafactor
from tunesmith.ops.rules.adamw import AdamWSettings, NewAdamW
from tunesmith.ops.rules.apollo import ApolloSettings, NewApollo
from tunesmith.ops.rules.badam import BadamSettings, BlockAdamW
from tunesmith.ops.rules.galore import GaloreSettings, NewGalore
from tunesmith.ops.rules.lion import LionSettings, NewLion
from tunesmith.ops.rules.muon import MuonSettings, NewMuon
from tunesmith.ops.rules.sgd import NewSgd, SgdSettings

PRETRAINED_OUTSIDE = re.compile(r"embed|wte|wpe|norm|ln_f|lm_head")
"""Names outside the layers that BAdam may leave as they are. Anything else may be a new head."""


def build_optimizer(
    parameters: list[tuple[str, torch.nn.Parameter]],
    train: TrainConfig,
    method: Method | None = None,
) -> Optimizer:
    """The optimizer that the recipe wants; only matrices decay.

    Args:
        parameters: what is trained, already on its device; they become views of flat buffers.
        train: weight decay, seed, and `optimizer`.
        method: may give some parameters a learning rate of their own; None gives all the same.

    Raises:
        RecipeError: there is nothing that the rule is for, or it leaves out what is new
            (`recipe.optimizer`).
    """
    config = train.optimizer
    flat = FlatSettings(train.weight_decay, config.keep_master, train.seed)
    if isinstance(config, BadamConfig):
        return _build_badam(parameters, config, flat)
    names = [name for name, _ in parameters]
    assignments = _assign(parameters, config, train.seed)
    return build_flat(assignments, flat, rate_factors(names, method))


def rate_factors(names: list[str], method: Method | None) -> dict[str, float]:
    """Factors on the learning rate by parameter: LoRA+ (arXiv 2402.12354) gives one to all B."""
    if not isinstance(method, LoraConfig) or method.plus_ratio is None:
        return {}
    return {name: method.plus_ratio for name in names if ".lora_B." in name}


def _assign(
    parameters: Sequence[NamedParameter], config: AnyOptimizer, seed: int
) -> list[Assignment]:
    if isinstance(config, LionConfig):
        lion = LionSettings(config.beta1, config.beta2, config.states)
        return [Assignment(parameters, NewLion(lion))]
    if isinstance(config, SgdConfig):
        return [Assignment(parameters, NewSgd(SgdSettings(config.momentum, config.states)))]
    if isinstance(config, AdafactorConfig):
        adafactor = AdafactorSettings(config.decay, config.clip, config.floor)
        return [Assignment(parameters, NewAdafactor(adafactor))]
    new_adamw = NewAdamW(_adamw(config))
    if isinstance(config, AdamWConfig | BadamConfig):
        return [Assignment(parameters, new_adamw)]
    matrices = [(name, p) for name, p in parameters if is_hidden_matrix(name, p.shape)]
    others = [(name, p) for name, p in parameters if not is_hidden_matrix(name, p.shape)]
    if not matrices:
        raise RecipeError(
            "recipe.optimizer",
            "train.optimizer",
            found=f"{config.name}, but no matrix inside a layer is trained",
            expected="a method that trains some",
            try_="train.optimizer=adamw",
        )
    assignments = [Assignment(matrices, _new_matrix_rule(config, seed))]
    return [*assignments, Assignment(others, new_adamw)] if others else assignments


def _adamw(
    config: AdamWConfig | BadamConfig | MuonConfig | GaloreConfig | ApolloConfig,
) -> AdamWSettings:
    low_rank = isinstance(config, GaloreConfig | ApolloConfig)
    states = "float32" if low_rank else config.states
    return AdamWSettings(config.beta1, config.beta2, config.epsilon, states)


def _new_matrix_rule(config: MuonConfig | GaloreConfig | ApolloConfig, seed: int) -> NewRule:
    if isinstance(config, MuonConfig):
        return NewMuon(MuonSettings(config.momentum, config.iterations, config.states))
    adam, rank, every = _adamw(config), config.rank, config.update_every
    if isinstance(config, GaloreConfig):
        return NewGalore(GaloreSettings(adam, rank, every, config.scale), seed)
    by_channel = config.factors == "channel"
    return NewApollo(ApolloSettings(adam, rank, every, config.scale, by_channel), seed)


def _build_badam(
    parameters: Sequence[NamedParameter], config: BadamConfig, flat: FlatSettings
) -> BlockAdamW:
    """One block for each numbered layer, in the model's order, and perhaps one for the rest."""
    layers: dict[str, list[NamedParameter]] = {}
    outside: list[NamedParameter] = []
    for name, parameter in parameters:
        found = re.match(r"(.*?\.\d+)\.", name)
        place = layers.setdefault(found[1], []) if found else outside
        place.append((name, parameter))
    blocks = list(layers.values())
    if config.outside and outside:
        blocks, outside = [*blocks, outside], []
    new = [name for name, _ in outside if not PRETRAINED_OUTSIDE.search(name)]
    if new:
        raise RecipeError(
            "recipe.optimizer",
            "train.optimizer",
            found=f"badam, which would never train {', '.join(new[:3])}",
            expected="all that is new to be trained",
            try_="train.optimizer.outside=true",
        )
    settings = BadamSettings(_adamw(config), flat, config.switch_every, config.order)
    return BlockAdamW(blocks, outside, settings)
