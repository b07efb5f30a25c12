"""Makes a loaded model trainable by the recipe's method, and writes and reads what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.recipe import FreezeConfig, FullConfig, LoraConfig
from tunesmith.errors import RecipeError
from tunesmith.io.headers import check_safetensors
from tunesmith.model.layers import decoder_of, layer_list, names_of_lower_layers, parts_above

ADAPTER_FILE = "adapter_model.safetensors"
TRAINED_FILE = "trained.safetensors"
"""What was trained of a model most of whose weights are frozen."""


def attach(
    model: Any, method: FullConfig | LoraConfig | FreezeConfig, revision: str | None = None
) -> Any:
    """Prepares a model for training.

    LoRA wraps it in a PEFT model with fp32 adapters. Weights that are trained themselves keep their
    type; in half precision they need an optimizer that does not round small updates away.

    Raises:
        RecipeError: `method.target` names no layer of the model (`recipe.target`), it has fewer
            layers than `method.layers` (`recipe.layers`), or `method.head` is its embedding, too
            (`recipe.tied-head`).
    """
    if isinstance(method, FullConfig):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    if isinstance(method, FreezeConfig):
        return _freeze(model, method)
    return _adapt(model, method, revision)


def _freeze(model: Any, method: FreezeConfig) -> Any:
    """Leaves the last layers trainable, with final norm and head as the method says."""
    decoder = decoder_of(model)
    _, layers = layer_list(decoder)
    _check_layers(method.layers, len(layers))
    trained: list[torch.nn.Module] = list(layers[len(layers) - method.layers :])
    if method.norm:
        trained += parts_above(decoder)
    if method.head:
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight:
            raise RecipeError(
                "recipe.tied-head",
                "method.head",
                found="a head that is the embedding, too, which lies below all layers",
                expected="head: false, or a model whose head has weights of its own",
                try_="method: full trains everything",
            )
        trained.append(head)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return model


def _adapt(model: Any, method: LoraConfig, revision: str | None) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    if method.rank == "auto" or method.alpha == "auto":
        raise ValueError("resolve the recipe before attaching adapters")
    lower = None
    if method.layers is not None:
        _check_layers(method.layers, len(layer_list(decoder_of(model))[1]))
        lower = names_of_lower_layers(model, method.layers)
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        # PEFT's field is an int; alpha/r is a plain division, so a float serves as well.
        lora_alpha=int(method.alpha) if float(method.alpha).is_integer() else method.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=method.dropout,
        target_modules=method.target,
        # PEFT's layers_to_transform does not go with targets that are one string, as all-linear is.
        exclude_modules=lower,
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


@dataclass(frozen=True)
class TrainedWeights:
    """What is trained of a model, for checkpoints: without the weights that stay as they are."""

    model: Any

    @property
    def num_bytes(self) -> int:
        """Of the tensors that are trained."""
        return sum(parameter.nbytes for _, parameter in trainable_parameters(self.model))

    def writer(self, *, copies: bool) -> Callable[[Path], None]:
        """What writes the weights into a folder, in any thread.

        Args:
            copies: write them as they are now, whatever becomes of them.
        """
        model, trained = self.model, dict(trainable_parameters(self.model))
        if hasattr(model, "peft_config") or len(trained) == len(list(model.parameters())):
            state = None
            if copies:  # what is frozen stays as it is without
                state = model.state_dict()
                # By place, not by name: a tied weight has two names, of which one is a parameter's.
                places = {parameter.data_ptr() for parameter in trained.values()}
                state.update(_copied({n: t for n, t in state.items() if t.data_ptr() in places}))
            return partial(save_weights, model, state=state)
        tensors = {name: parameter.detach().contiguous() for name, parameter in trained.items()}
        return partial(_write_tensors, _copied(tensors) if copies else tensors)

    def load(self, folder: Path) -> None:
        """See `load_weights`."""
        load_weights(self.model, folder)


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TRAINED_FILE)


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the host's memory; tensors that are one (tied weights) stay one."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in tensors.values():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}


def save_weights(
    model: Any, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the result in its usual format: PEFT's for adapters, else the whole model.

    Args:
        model: the model.
        folder: where to.
        state: weights to write in place of the model's own.
    """
    model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    card = folder / "README.md"
    card.unlink(missing_ok=True)  # PEFT's card is a form to fill in; ours comes with the export


def load_weights(model: Any, folder: Path) -> None:
    """Copies weights written by `save_weights` or `save_trained` into the model, bit for bit.

    Raises:
        ValueError: a weight that is trained is missing or has another shape, or the model has no
            weight of a name; a
            ModelError if a file does not fit its header (`model.bad-safetensors`).
    """
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "optim.safetensors":
            check_safetensors(file)
            stored.update(load_file(file))
    targets = dict(_stored_names(model))
    trained = {name for name, tensor in targets.items() if tensor.requires_grad}
    missing = sorted(trained - set(stored))
    # PEFT writes the frozen weight of an adapted embedding or head beside its adapter.
    stored = {name: tensor for name, tensor in stored.items() if ".base_layer." not in name}
    unknown = sorted(set(stored) - set(targets))
    # A tied head is stored once, under the embedding's name.
    tied: set[str] = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unknown:
        raise ValueError(f"weights missing: {missing[:5]}, unknown: {unknown[:5]}")
    resized = sorted(name for name, tensor in stored.items() if tensor.shape != targets[name].shape)
    if resized:
        raise ValueError(f"weights of another shape: {resized[:5]}")
    with torch.no_grad():
        for name, tensor in stored.items():
            targets[name].copy_(tensor)


def _stored_names(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under the names `save_weights` gives them."""
    if not hasattr(model, "peft_config"):
        # keep_vars: the parameters themselves, which know whether they are trained.
        yield from model.state_dict(keep_vars=True).items()
        return
    for name, parameter in trainable_parameters(model):
        yield re.sub(r"\.default(?=\.|$)", "", name), parameter


def _check_layers(wanted: int, available: int) -> None:
    if wanted > available:
        raise RecipeError(
            "recipe.layers",
            "method.layers",
            found=str(wanted),
            expected=f"at most {available}, the layers of this model",
        )


def _linear_names(model: Any) -> list[str]:
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return sorted(names)[:12]
