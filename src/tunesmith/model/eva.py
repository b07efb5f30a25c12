"""First values of LoRA from what layers see: the main directions of their inputs (EVA).

arXiv 2410.07170, algorithm 1, without its sharing out of ranks (rho is 1): A becomes the first
right singular vectors of a layer's inputs at the tokens that predict what is learned. B is zero, so
the model computes what it did. Batches are added one by one to a singular value decomposition that
keeps as many directions as A has rows, around the running mean (incremental PCA, as PEFT's
`initialize_lora_eva_weights`), until a layer's directions stand still.

Layers that are given the same tensor (queries, keys and values; gate and up) share one.

Shape letters: N tokens, I inputs, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from tunesmith.model.layers import decoder_of
from tunesmith.model.low_rank import truncated_svd
from tunesmith.types import GlobalBatch, PackedBatch

MOST_BATCHES = 16
"""PEFT goes on until all directions stand still; the last ones of a rank hardly matter."""
MOST_TOKENS = 512
"""Of a batch, evenly chosen: a decomposition's time grows with them, and there are more batches."""
STILL = 0.99
"""Cosine between a direction before and behind a batch; PEFT's `tau`."""


@dataclass
class Directions:
    """The main directions of vectors that come in batches.

    Args:
        rank: how many to keep.
    """

    rank: int
    count: int = 0
    mean_I: torch.Tensor | None = None
    scaled_RI: torch.Tensor | None = None
    """Directions times their singular values."""
    is_still: bool = False

    def add(self, vectors_NI: torch.Tensor) -> None:
        """Takes in a batch (incremental PCA, Ross et al. 2008, section 3.1)."""
        num, mean_I = len(vectors_NI), vectors_NI.mean(0)
        stacked = [vectors_NI - mean_I]
        if self.mean_I is not None and self.scaled_RI is not None:
            total = self.count + num
            shift_I = (self.count * num / total) ** 0.5 * (self.mean_I - mean_I)
            stacked = [self.scaled_RI, *stacked, shift_I[None]]
            mean_I = (self.count * self.mean_I + num * mean_I) / total
        before = self.found() if self.scaled_RI is not None else None
        _, s_R, v_IR = truncated_svd(torch.cat(stacked), self.rank)
        self.count, self.mean_I = self.count + num, mean_I
        self.scaled_RI = s_R[:, None] * v_IR.T
        after = self.found()
        if before is not None and before.shape == after.shape:
            self.is_still = bool(((before * after).sum(1).abs() >= STILL).all())

    def found(self) -> torch.Tensor:
        """Directions of length 1, the main one first."""
        if self.scaled_RI is None:
            raise ValueError("no batch yet")
        return torch.nn.functional.normalize(self.scaled_RI, dim=1)


@dataclass
class Listener:
    """Follows the inputs of adapted layers through forwards of their decoder.

    Args:
        rank: of the largest adapter.
    """

    rank: int
    rows_N: torch.Tensor | None = None
    """Tokens that count."""
    shared_with: dict[str, str] = field(default_factory=dict[str, str])
    """Layer -> the first one that is given the same tensor."""
    directions: dict[str, Directions] = field(default_factory=dict[str, Directions])
    last: tuple[str, Any] = ("", None)
    """The layer that ran before, and its input: kept alive, so that its place is not used again."""

    def hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        """What a layer calls before its forward."""
        return lambda _, inputs: self.hear(name, inputs[0])

    def hear(self, name: str, x_1TI: torch.Tensor) -> None:
        """Adds a layer's input, once for all layers that share it."""
        before, its_input = self.last
        if name not in self.shared_with:
            is_same = x_1TI is its_input
            self.shared_with[name] = self.shared_with[before] if is_same else name
            if not is_same:
                self.directions[name] = Directions(self.rank)
        self.last = (name, x_1TI)
        found = self.directions.get(name)
        if found is not None and not found.is_still and self.rows_N is not None:
            found.add(x_1TI[0, self.rows_N].float())


def learn_directions(
    model: Any, batch_of: Callable[[int], GlobalBatch], device: torch.device
) -> int:
    """Gives each LoRA adapter EVA's first values; returns how many batches were looked at.

    Args:
        model: a PEFT model of LoRA with transformers' own forwards, nothing trained yet.
        batch_of: the run's batch of a step; `MOST_BATCHES` micro-batches at most are taken.
        device: of the model.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    ranks = [module.lora_A["default"].weight.shape[0] for module in layers.values()]
    listener, decoder, count = Listener(max(ranks)), decoder_of(model), 0
    was_training = model.training
    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.train, was_training)
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(listener.hook(name)).remove)
        model.eval()
        steps = map(batch_of, range(MOST_BATCHES))
        micro_batches = (micro for step in steps for micro in step.micro_batches)
        for batch in islice(micro_batches, MOST_BATCHES):
            _run(decoder, listener, batch.to(device))
            count += 1
            if all(each.is_still for each in listener.directions.values()):
                break
        for name, module in layers.items():
            _begin(module.lora_A["default"].weight, listener, name)
    return count


def _run(decoder: Any, listener: Listener, batch: PackedBatch) -> None:
    rows_N = batch.row_N.unique()
    if not len(rows_N):
        return
    listener.rows_N = rows_N[:: -(-len(rows_N) // MOST_TOKENS)]
    half = decoder.get_input_embeddings().weight.dtype
    with torch.autocast(rows_N.device.type, half, enabled=half.itemsize < 4):
        decoder(
            input_ids=batch.ids_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            segments=batch.segments,
        )
    listener.last = ("", None)


def _begin(a_RI: torch.Tensor, listener: Listener, name: str) -> None:
    """Rows for which the data has no direction stay as they were drawn."""
    owner = listener.shared_with.get(name)
    if owner is None or listener.directions[owner].scaled_RI is None:
        return
    found = listener.directions[owner].found()[: len(a_RI)]
    a_RI[: len(found)].copy_(found)
