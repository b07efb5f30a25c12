"""One frozen base for several models: each has modules of its own around the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.method import MUTATING_INITS, LoraConfig
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import Recipe
from tunesmith.model.device import find_device
from tunesmith.model.load import ModelSource, load_model


def leaves_base_alone(recipe: Recipe) -> bool:
    """Whether training by a recipe changes nothing of the base's own weights.

    Quantized weights are left out: they carry state besides their numbers.
    """
    method, model = recipe.method, recipe.model
    return (
        isinstance(method, LoraConfig)
        and method.init not in (*MUTATING_INITS, "loftq")
        and not (method.train_modules or method.train_tokens)
        and method.bias == "none"
        and model.quantize == "none"
        and model.adapter is None
        and not (model.new_tokens or model.new_special_tokens)
        # The first two draw a new head into the model that was loaded.
        and not isinstance(recipe.objective, RewardConfig | ClassifyConfig | SamplingConfig)
    )


class SharedBase:
    """Loads a base once and gives out models that share its weights.

    Each has its own modules, so that adapters and forwards of one are not seen by another, and its
    own flags and gradients: only the numbers are common. Nobody may write into these; see
    `leaves_base_alone`.
    """

    def __init__(self) -> None:
        self._known: tuple[ModelSource, dict[str, Any]] | None = None
        self._base: Any = None

    def load(self, source: ModelSource, **how: Any) -> Any:
        """What `load_model` gives, without loading again what is there."""
        if self._known != (source, how):
            self._base = None  # before another one comes: there may be no room for both
            self._base = load_model(source, **how).to(find_device().torch_device)
            self._known = (source, how)
        return with_shared_weights(self._base)


def with_shared_weights(model: Any) -> Any:
    """A copy of a model whose parameters are the same memory; its buffers are copied."""
    shared = {
        id(parameter): torch.nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict[int, Any](shared))
