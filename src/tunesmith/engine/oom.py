"""Running out of memory: the same samples again in smaller parts."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

import torch

from tunesmith.types import GlobalBatch, PackedBatch

SMALLEST_TOKENS = 8
"""A budget that small makes every sequence a micro-batch of its own."""

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


class TooLargeError(Exception):
    """A micro-batch for which memory did not suffice.

    Args:
        batch: the micro-batch.
        said: what the allocator said.
    """

    def __init__(self, batch: PackedBatch, said: str) -> None:
        super().__init__(said)
        self.batch = batch
        asked = _ASKED.search(said)
        self.asked = asked[1] if asked else None


def free_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def smaller_budget(packed: Callable[[int], GlobalBatch], failed_tokens: int) -> int | None:
    """Half the tokens at once, or less, so that the step's largest micro-batch gets smaller.

    Args:
        packed: the global batch that did not fit, with another budget.
        failed_tokens: rows of the micro-batch that was too large.

    Returns:
        None if each sequence is alone already and one of them is as large as what failed.
    """
    budget = failed_tokens
    while budget > SMALLEST_TOKENS:
        budget //= 2
        micro_batches = packed(budget).micro_batches
        if max(batch.num_stored_tokens for batch in micro_batches) < failed_tokens:
            return budget
    return None
