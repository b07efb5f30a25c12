"""Builds the model that a run trains: weights, adapters, fast forwards, cached trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.auto import number
from tunesmith.config.budget import Level
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import Recipe
from tunesmith.io.cache import cache_folder
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.embeddings import install_noise
from tunesmith.model.eva import learn_directions
from tunesmith.model.fast_path import fast_layers, make_fast, set_levels
from tunesmith.model.heads import draw_head, has_scores, scores_of
from tunesmith.model.layers import first_trainable_layer
from tunesmith.model.load import PACKED_ATTENTION, ModelSource, load_model
from tunesmith.model.loftq import make_up_for_rounding
from tunesmith.model.memory import StepBytes, measure_step, probe_batch
from tunesmith.model.packing import check_packing
from tunesmith.model.start import continue_start, merged_start
from tunesmith.model.trunk import CachedTrunk, open_trunk
from tunesmith.ops.kernels import are_fused, fuse_kernels
from tunesmith.types import GlobalBatch, PackedBatch


@dataclass(frozen=True)
class BuiltModel:
    """A model that is ready to train.

    Args:
        model: on its device, with what is trained in it.
        parameters: what is trained, by name.
        wants_trunk: there are frozen lower layers, and more epochs than one.
        trunk: these layers, run once a sequence; None where that cannot be.
        autocast_dtype: what products are computed in where weights are not of one type.
        notes: whose forward runs, and what is kept of the trunk.
    """

    model: Any
    parameters: list[tuple[str, torch.nn.Parameter]]
    wants_trunk: bool
    trunk: CachedTrunk | None
    autocast_dtype: torch.dtype | None
    notes: tuple[str, ...]

    def measure_memory(self, step: Callable[[Any, PackedBatch], Any], num_tokens: int) -> StepBytes:
        """Memory of a small forward and backward; leaves no gradients.

        Args:
            step: of the objective; its result has a `loss_sum`. A model of scores takes their sum.
            num_tokens: of the batch.
        """
        device = self.parameters[0][1].device
        dtype = self.autocast_dtype

        def loss_of(num_tokens: int) -> torch.Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                batch = probe_batch(num_tokens, device)
                if has_scores(self.model):
                    place = (batch.ids_T, batch.position_T, batch.segments, batch.last_S)
                    return scores_of(self.model, *place).sum()
                return step(self.model, batch).loss_sum

        # Dynamo gives up for good on what it first meets under a dispatch mode, which counts here.
        is_fused = are_fused()
        fuse_kernels(is_on=False)
        found = measure_step(loss_of, num_tokens, device)
        fuse_kernels(is_on=is_fused)
        for _, parameter in self.parameters:
            parameter.grad = None
        return found

    def set_levels(self, levels: Sequence[Level]) -> None:
        """Says for each layer with our forward what its backward makes again.

        Args:
            levels: of the layers from the first trained one on.
        """
        layers = fast_layers(self.model)
        if layers:
            frozen: list[Level] = ["none"] * (len(layers) - len(levels))
            set_levels(self.model, [*frozen, *levels])


def build_model(
    source: ModelSource,
    recipe: Recipe,
    device: torch.device,
    *,
    num_tokens: int,
    seed: Callable[[], None],
    batch_of: Callable[[int], GlobalBatch] | None = None,
    load: Callable[..., Any] = load_model,
) -> BuiltModel:
    """Loads weights, attaches what is trained, and installs the fast forwards.

    All weights are of the type that is computed with: what full tuning needs beyond bfloat16 are
    the optimizer's float32 master copies.

    Args:
        source: of the weights.
        recipe: resolved.
        device: where it will be.
        num_tokens: of all sequences, for the room that a cached trunk takes.
        seed: seeds the drawing of new weights.
        batch_of: the run's batch of a step, for first values that follow the data; None where a
            checkpoint has the weights.
        load: gives the base, as `load_model` does; another one may share its frozen weights.
    """
    dtype, train, notes = recipe.model.dtype, recipe.train, list[str]()
    base = load(source, dtype=dtype, attention=PACKED_ATTENTION, quantize=recipe.model.quantize)
    check_packing(base, source.label)
    model = _prepare(base, source, recipe, seed).to(device)
    init = getattr(recipe.method, "init", "default")
    if init == "loftq":
        make_up_for_rounding(model, source)
    elif init == "eva" and batch_of is not None:
        learn_directions(model, batch_of, device)
    fuse_kernels(is_on=train.compile == "kernels")
    notes.append(make_fast(model))
    autocast_dtype = None
    if dtype == "bfloat16" and not fast_layers(model):
        autocast_dtype = torch.bfloat16  # float32 adapters between bfloat16 weights
    # Noise comes before the lowest layer: what leaves the frozen ones is never the same again.
    # Sampled answers never come again.
    samples_answers = isinstance(recipe.objective, SamplingConfig)
    is_fixed = (
        train.neftune_alpha is None and not samples_answers and first_trainable_layer(model) > 0
    )
    trunk, wants_trunk = None, number(train.epochs) > 1 and is_fixed
    if wants_trunk:
        trunk = open_trunk(
            model,
            cache_folder("trunks"),
            num_tokens=num_tokens,
            note=notes.append,
            autocast_dtype=autocast_dtype,
        )
    if train.checkpointing not in ("auto", "none") and not fast_layers(model):
        notes.append("train.checkpointing has no effect: it needs our own forward of the layers")
    return BuiltModel(
        model, trainable_parameters(model), wants_trunk, trunk, autocast_dtype, tuple(notes)
    )


def _prepare(base: Any, source: ModelSource, recipe: Recipe, seed: Callable[[], None]) -> Any:
    """The base with what is trained on it, begun from another adapter if the recipe says so."""
    merged, goes_on = None, source.adapter is not None
    if goes_on and recipe.model.merge_adapter:
        base, merged = merged_start(base, source)
    seed()
    draw_head(base)
    model = attach(base, recipe.method, source.revision, merged=merged)
    if goes_on and not recipe.model.merge_adapter:
        continue_start(model, source)
    install_noise(model, recipe.train.neftune_alpha)
    return model
