"""Makes a loaded model trainable by the recipe's method, and writes and reads what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.method import (
    MUTATING_INITS,
    AdapterConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    Method,
)
from tunesmith.errors import RecipeError
from tunesmith.io.headers import check_safetensors
from tunesmith.model.embeddings import install_prompt
from tunesmith.model.heads import has_scores, write_head
from tunesmith.model.layers import decoder_of, layer_list, names_of_lower_layers, parts_above
from tunesmith.model.low_rank import (
    Changes,
    changes_of,
    is_low_rank,
    lora_products,
    note_changes,
    save_as_one,
)
from tunesmith.model.peft_config import (
    adapter_config,
    check_modules,
    lora_config,
    refused_by_peft,
    target_error,
)
from tunesmith.model.vocabulary import (
    prepare_token_rows,
    saves_rows_alone,
    target_token_layers,
    token_layers,
)

ADAPTER_FILE = "adapter_model.safetensors"
TRAINED_FILE = "trained.safetensors"
"""What was trained of a model most of whose weights are frozen."""


def attach(
    model: Any, method: Method, revision: str | None = None, *, merged: Changes | None = None
) -> Any:
    """Prepares a model for training.

    Adapters wrap it in a PEFT model, LoRA's in fp32. Weights that are trained themselves keep their
    type; in half precision they need an optimizer that does not round small updates away.

    Args:
        model: the base model.
        method: of the recipe, resolved.
        revision: of the base model, for the adapter's file.
        merged: what an adapter merged before has changed of the weights.

    Raises:
        RecipeError: `method.target` or another pattern names nothing in the model
            (`recipe.target`), it has fewer layers than `method.layers` (`recipe.layers`),
            `method.head` is its embedding, too (`recipe.tied-head`), or PEFT refuses the adapter
            (`recipe.adapter`, `recipe.unknown-key`).
    """
    if isinstance(method, FullConfig):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    if isinstance(method, FreezeConfig):
        return _freeze(model, method)
    if isinstance(method, AdapterConfig):
        config = adapter_config(method)
        if method.kind == "TRAINABLE_TOKENS":
            target_token_layers(model, config)
        wrapped = _wrap(model, config, method.kind, revision)
        prepare_token_rows(wrapped)
        if not sum(parameter.numel() for _, parameter in trainable_parameters(wrapped)):
            raise refused_by_peft(method.kind, ValueError("nothing is trained with these settings"))
        if method.is_prompt:
            install_prompt(wrapped)
        return wrapped
    wrapped = _adapt(model, method, revision)
    taken_out = lora_products(wrapped, sign=-1.0) if method.init in MUTATING_INITS else {}
    if taken_out or merged:
        note_changes(wrapped, merged or {}, taken_out)
    return wrapped


def _freeze(model: Any, method: FreezeConfig) -> Any:
    """Leaves chosen layers trainable, with final norm, head and embedding as the method says."""
    decoder = decoder_of(model)
    _, layers = layer_list(decoder)
    _check_layers(max(method.layers, method.first), len(layers))
    trained: list[torch.nn.Module] = list(layers[len(layers) - method.layers :])
    trained += layers[: method.first]
    if method.embeddings:
        trained.append(model.get_input_embeddings())
    if method.norm:
        trained += parts_above(decoder)
    if has_scores(model):
        trained.append(model.score)
    elif method.head:
        head = model.get_output_embeddings()
        if head.weight is model.get_input_embeddings().weight and not method.embeddings:
            raise RecipeError(
                "recipe.tied-head",
                "method.head",
                found="a head that is the embedding, too, which lies below all layers",
                expected="head: false, or a model whose head has weights of its own",
                try_="embeddings: true trains both",
            )
        trained.append(head)
    by_name = _named_by(model, method.pattern) if method.pattern is not None else []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in (*trained, *by_name):
        module.requires_grad_(True)
    return model


def _named_by(model: Any, pattern: str) -> list[torch.nn.Parameter]:
    """The parameters in whose names a pattern is found."""
    try:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise _pattern_error(pattern, f"no regular expression ({error})") from None
    if not found:
        raise _pattern_error(pattern, "found in no parameter's name")
    return found


def _pattern_error(pattern: str, problem: str) -> RecipeError:
    return RecipeError(
        "recipe.target",
        "method.pattern",
        found=f"{pattern!r}, {problem}",
        expected="a regular expression such as layers.0.*norm",
    )


def _adapt(model: Any, method: LoraConfig, revision: str | None) -> Any:
    lower = None
    if method.layers is not None:
        _check_layers(method.layers, len(layer_list(decoder_of(model))[1]))
        lower = names_of_lower_layers(model, method.layers)
    check_modules(model, method.train_modules)
    try:
        wrapped = _wrap(
            model,
            lora_config(
                method,
                lower,
                is_tied=_trains_tied(model, method),
                tokens=token_layers(model, method),
            ),
            "LoRA",
            revision,
        )
    except RecipeError as error:
        cause = error.__cause__
        if isinstance(cause, re.error) or "arget modules" in str(cause):
            raise target_error(model, "target", method.target) from cause
        raise
    for module in wrapped.modules():
        # PEFT widens each adapter's input to the adapter's fp32, and autocast narrows it again: two
        # copies of every activation for nothing. Without the first, the numbers are the same.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    prepare_token_rows(wrapped)
    return wrapped


def _trains_tied(model: Any, method: LoraConfig) -> bool:
    """Whether a matrix that is both embedding and head is trained whole."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = [name for name, module in model.named_modules() if module in (embedding, head)]
    wanted = tuple(method.train_modules)
    return any(f".{name}".endswith(tuple(f".{each}" for each in wanted)) for name in names)


def _wrap(model: Any, config: Any, kind: str, revision: str | None) -> Any:
    from peft import get_peft_model

    if has_scores(model):
        config.task_type = "SEQ_CLS"
    try:
        wrapped = get_peft_model(model, config, revision=revision)
    except (ValueError, TypeError, KeyError, NotImplementedError, re.error) as error:
        raise refused_by_peft(kind, error) from error
    if has_scores(model) and hasattr(config, "modules_to_save"):
        # PEFT adds its two names of such heads to the list, of which this model has one.
        names = dict.fromkeys([*config.modules_to_save, "score"])
        config.modules_to_save = [name for name in names if name != "classifier"]
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
        if is_plain_lora(model) or len(trained) == len(list(model.parameters())):
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
    if hasattr(model, "peft_config") and has_scores(model):
        folder.mkdir(parents=True, exist_ok=True)
        write_head(model, folder)
    if changes_of(model):
        save_as_one(model, folder)
        return
    how = saves_rows_alone(model) | ({} if state is None else {"state_dict": state})
    model.save_pretrained(folder, **how)
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
    is_raw = (folder / TRAINED_FILE).exists() and hasattr(model, "peft_config")
    targets = dict(trainable_parameters(model) if is_raw else _stored_names(model))
    trained = {name for name, tensor in targets.items() if tensor.requires_grad}
    missing = sorted(trained - set(stored))
    if not is_raw:
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


def is_plain_lora(model: Any) -> bool:
    """Whether PEFT's file of a LoRA adapter has all that is trained, under its own names.

    Others leave something out (the network behind p-tuning's tokens) or rename it.
    """
    if not hasattr(model, "peft_config"):
        return False
    return is_low_rank(model.peft_config["default"]) and not changes_of(model)


def _check_layers(wanted: int, available: int) -> None:
    if wanted > available:
        raise RecipeError(
            "recipe.layers",
            "method.layers",
            found=str(wanted),
            expected=f"at most {available}, the layers of this model",
        )
