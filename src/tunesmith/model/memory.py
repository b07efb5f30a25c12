"""What a run will need, computed from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.recipe import FullConfig, LoraConfig, Recipe
from tunesmith.model.adapters import attach, trainable_parameters


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model and of what is trained of it."""

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory of a run in bytes."""

    weight_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: int


def measure_config(config: Any, method: FullConfig | LoraConfig) -> Sizes:
    """Counts a model's parameters, and those that a method trains, without making them.

    Raises:
        RecipeError: the method's target names no layer.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = attach(model, _with_numbers(method))
    text = config.get_text_config()
    hidden = text.hidden_size
    return Sizes(
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for _, p in trainable_parameters(trained)),
        num_layers=text.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        context_tokens=getattr(text, "max_position_embeddings", None) or 4096,
    )


def estimate_needs(sizes: Sizes, recipe: Recipe, *, is_bf16: bool) -> Needs:
    """Estimates the memory of a recipe on a model.

    Activations per token and layer are those kept for the backward: two residuals, two norm
    outputs, q, k, v, attention output, gate, up, their product, and the fp32 copies that PEFT's
    adapters make of their inputs.
    """
    is_lora = isinstance(recipe.method, LoraConfig)
    width = 2 if is_bf16 else 4
    base_width = width if is_lora else 4  # full tuning keeps fp32 weights
    kept = 8 * sizes.hidden_size + 3 * sizes.intermediate_size
    copies = (3 * sizes.hidden_size + sizes.intermediate_size) * 4 if is_lora and is_bf16 else 0
    return Needs(
        weight_bytes=sizes.num_parameters * base_width,
        # Two moments and a gradient in fp32, and the adapter's own fp32 weights.
        optimizer_bytes=sizes.num_trained * (8 + 4 + (4 if is_lora else 0)),
        activation_bytes_per_token=sizes.num_layers * (kept * width + copies),
    )


def _with_numbers(method: FullConfig | LoraConfig) -> FullConfig | LoraConfig:
    if isinstance(method, FullConfig):
        return method
    rank = 16 if method.rank == "auto" else method.rank
    return method.model_copy(update={"rank": rank, "alpha": 2.0 * rank})
