"""What a run will need, computed from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.config.recipe import LoraConfig, Recipe


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_tokens: int
    num_head_parameters: int


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory in bytes, trained parameters, and floating-point operations per token."""

    weight_bytes: int
    trained_parameters: int
    optimizer_bytes: int
    activation_bytes_per_token: int
    flops_per_token: int


def measure_config(config: Any) -> Sizes:
    """Counts a model's parameters without making them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    hidden = text.hidden_size
    return Sizes(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocab_size=text.vocab_size,
        context_tokens=getattr(text, "max_position_embeddings", None) or 4096,
        num_head_parameters=text.vocab_size * hidden,
    )


def estimate_needs(sizes: Sizes, recipe: Recipe, *, is_bf16: bool) -> Needs:
    """Estimates memory and work of a recipe on a model.

    Activations per token and layer are those kept for the backward: two residuals, two norm
    outputs, q, k, v, attention output, gate, up, their product, and the fp32 copies that PEFT's
    adapters make of their inputs. Measured peaks on SmolLM2-135M stay within a third of it.
    """
    is_lora = isinstance(recipe.method, LoraConfig)
    width = 2 if is_bf16 else 4
    base_width = width if is_lora else 4  # full tuning keeps fp32 weights
    trained = sizes.num_parameters
    if isinstance(recipe.method, LoraConfig):
        rank = 16 if recipe.method.rank == "auto" else recipe.method.rank
        per_layer = 4 * 2 * sizes.hidden_size + 3 * (sizes.hidden_size + sizes.intermediate_size)
        trained = rank * per_layer * sizes.num_layers
    kept = 8 * sizes.hidden_size + 3 * sizes.intermediate_size
    copies = (3 * sizes.hidden_size + sizes.intermediate_size) * 4 if is_lora and is_bf16 else 0
    decoder = sizes.num_parameters - sizes.num_head_parameters
    per_parameter = 4 if is_lora else 6  # forward, input gradient, and weight gradient if trained
    return Needs(
        weight_bytes=sizes.num_parameters * base_width,
        trained_parameters=trained,
        optimizer_bytes=trained * (8 + 4 + (4 if is_lora else 0)),
        activation_bytes_per_token=sizes.num_layers * (kept * width + copies),
        flops_per_token=per_parameter * (decoder + sizes.num_head_parameters // 2),
    )
