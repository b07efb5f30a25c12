"""The decoder layers of a model, and where what is trained begins among them."""

from __future__ import annotations

import re
from typing import Any

import torch


def decoder_of(model: Any) -> Any:
    """The decoder of a causal language model, adapted or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


def layer_list(decoder: Any) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of a decoder's layers, in the order they run.

    Raises:
        ValueError: it has no list of as many modules as its configuration has layers.
    """
    count = decoder.config.get_text_config().num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return name, child
    raise ValueError(f"{type(decoder).__name__} has no list of {count} layers")


def parts_below(decoder: Any) -> list[Any]:
    """What runs before the first layer: the modules registered before the list of layers."""
    name, _ = layer_list(decoder)
    names = [child for child, _ in decoder.named_children()]
    return [getattr(decoder, child) for child in names[: names.index(name)]]


def parts_above(decoder: Any) -> list[Any]:
    """What runs behind the last layer: the modules registered after the list of layers."""
    name, _ = layer_list(decoder)
    names = [child for child, _ in decoder.named_children()]
    return [getattr(decoder, child) for child in names[names.index(name) + 1 :]]


def first_trainable_layer(model: Any) -> int:
    """How many whole layers lie below everything that is trained.

    0 if the embedding or anything else before the layers is trained; the number of all layers if
    only the final norm or the head is.
    """
    if hasattr(model, "prompt_encoder"):
        return 0  # virtual tokens go through all layers
    decoder = decoder_of(model)
    _, layers = layer_list(decoder)
    if any(_is_trained(part) for part in [*parts_below(decoder), decoder.get_input_embeddings()]):
        return 0
    trained = (number for number, layer in enumerate(layers) if _is_trained(layer))
    return next(trained, len(layers))


def names_of_lower_layers(model: Any, keep: int) -> str | None:
    """A regular expression for the full names of all modules in the layers below the last `keep`.

    None if there are no such layers.
    """
    name, layers = layer_list(decoder_of(model))
    numbers = "|".join(str(number) for number in range(len(layers) - keep))
    return rf"(.*\.)?{re.escape(name)}\.({numbers})\..*" if numbers else None


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
