"""A model's weights with its adapter added, one after another: for engines that know no adapters.

The model itself keeps every bit: what is merged is a copy of one layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.io.safeload import model_view
from tunesmith.model.load import ModelSource, fetched


@contextmanager
def base_view(model: Any, revision: str | None) -> Generator[Path]:
    """A view of the files that a model's base was loaded from; see `io.safeload`.

    Raises:
        ModelError: they cannot be read any more.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    place = str(base.config.name_or_path)
    source = ModelSource(place, place, revision)
    folder = fetched(source, "model.unreadable", "a causal language model", with_weights=True)
    with model_view(folder, source.label, with_weights=True) as view:
        yield view


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights as the base model's files have them; tied weights come once.

    Exact where the adapter is: PEFT's own `merge` makes each layer's sum, rounded to the type of
    the base's weights. Layers that are quantized are beyond it.

    Args:
        model: with an adapter of PEFT or without.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    wrapped = {name: module for name, module in _wrappers(base).items() if name}
    for name, module in wrapped.items():
        if _is_tied(module):
            continue
        plain = _merged(copy.deepcopy(module))
        for part, weight in plain.named_parameters():
            yield f"{name}.{part}", weight.detach()
    for name, parameter in base.named_parameters():
        if not any(name.startswith(f"{prefix}.") for prefix in wrapped):
            yield name, parameter.detach()


def cannot_be_merged(model: Any) -> str | None:
    """What of a model is not among its merged weights, or has other names there; None if nothing.

    A prompt that is learned stands beside the weights; transformers 5 joins the experts of some
    models, which the files and other engines have one by one.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    known = {id(parameter) for parameter in base.parameters()}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    beside = [name for name, parameter in trained if id(parameter) not in known]
    if beside:
        return f"{beside[0]}, which is no part of the base model's weights"
    odd = [name for name, module in _wrappers(base).items() if not hasattr(module, _WAYS[0])]
    odd = [name for name in odd if not hasattr(base.get_submodule(name), _WAYS[1])]
    if odd:
        return f"{odd[0]}, whose adapter cannot be merged"
    if getattr(base, "_weight_conversions", None):
        return f"{type(base).__name__}, which transformers loads under other names"
    if base.config.get_text_config().tie_word_embeddings:
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        is_wrapped = any(hasattr(each, _WAYS[1]) for each in (head, embedding))
        if is_wrapped and not _is_tied(head):
            return "a head and an embedding that were tied, one of which is trained"
    return None


_WAYS = ("merge", "unload_and_optionally_merge_module")
"""How PEFT's layers merge, and how its wrappers of whole modules do."""


def _wrappers(base: Any) -> dict[str, Any]:
    """PEFT's outermost layers and wrappers, by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in base.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_inside:
            found[name] = module
    return found


def _is_tied(module: Any) -> bool:
    """Whether it is the head over an embedding with trained rows, which are the head's, too."""
    rows = getattr(module, "token_adapter", None)
    return getattr(rows, "tied_adapter", None) is not None


def _merged(module: Any) -> torch.nn.Module:
    """The plain module under a copy of an adapted one, with the adapter added."""
    if hasattr(module, _WAYS[1]):
        return module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    module.merge()
    return module.get_base_layer()
