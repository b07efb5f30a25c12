"""Makes a loaded model trainable by the recipe's method, and writes and reads what was trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.errors import RecipeError

ADAPTER_FILE = "adapter_model.safetensors"


def attach(model: Any, method: FullConfig | LoraConfig, revision: str | None = None) -> Any:
    """Prepares a model for training; LoRA wraps it in a PEFT model with fp32 adapters.

    Raises:
        RecipeError: `method.target` names no layer of the model (`recipe.target`).
    """
    if isinstance(method, FullConfig):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    if method.rank == "auto" or method.alpha == "auto":
        raise ValueError("resolve the recipe before attaching adapters")
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        # PEFT's field is an int; alpha/r is a plain division, so a float serves as well.
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=method.dropout,
        target_modules=method.target,
    )
    try:
        wrapped: Any = get_peft_model(model, config, revision=revision)
    except (ValueError, re.error) as error:
        raise RecipeError(
            "recipe.target",
            "method.target",
            found=f"{method.target!r}, which fits no layer",
            expected=f"names such as {', '.join(_linear_names(model))}",
        ) from error
    for module in wrapped.modules():
        # PEFT widens each adapter's input to the adapter's fp32, and autocast narrows it again: two
        # copies of every activation for nothing. Without the first, the numbers are the same.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return wrapped


def trainable_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and tensor of all that is trained, in the model's order."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def save_weights(model: Any, folder: Path) -> None:
    """Writes what was trained in its usual format: PEFT's for adapters, else transformers'."""
    model.save_pretrained(folder)
    card = folder / "README.md"
    card.unlink(missing_ok=True)  # PEFT's card is a form to fill in; ours comes with the export


def load_weights(model: Any, folder: Path) -> None:
    """Copies weights written by `save_weights` into the model, in place and bit for bit.

    Raises:
        ValueError: names in the files and in the model differ.
    """
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "optim.safetensors":
            stored.update(load_file(file))
    targets = dict(_stored_names(model))
    missing = sorted(set(targets) - set(stored))
    # PEFT writes the frozen weight of an adapted embedding or head beside its adapter.
    stored = {name: tensor for name, tensor in stored.items() if ".base_layer." not in name}
    unknown = sorted(set(stored) - set(targets))
    # A tied head is stored once, under the embedding's name.
    tied: set[str] = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unknown:
        raise ValueError(f"weights missing: {missing[:5]}, unknown: {unknown[:5]}")
    with torch.no_grad():
        for name, tensor in stored.items():
            targets[name].copy_(tensor)


def _stored_names(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under the names `save_weights` gives them."""
    if not hasattr(model, "peft_config"):
        yield from model.state_dict().items()
        return
    for name, parameter in trainable_parameters(model):
        yield re.sub(r"\.default(?=\.|$)", "", name), parameter.data


def _linear_names(model: Any) -> list[str]:
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return sorted(names)[:12]
