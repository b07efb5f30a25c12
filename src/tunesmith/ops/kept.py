"""Results of a forward pass that are not to be computed again when the backward runs it again.

Checkpointing drops everything inside a part of the model and runs it a second time in the backward.
What is dear to make and small to keep can be left out of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Results = tuple[torch.Tensor, ...]


class Kept:
    """Keeps results from the first pass of a checkpointed part, and gives them back in the second.

    Made anew for each pass through the part. Each result is given back once and forgotten, so that
    memory gets free as the backward goes on; a second backward over a graph that was retained
    computes it anew.
    """

    def __init__(self) -> None:
        self._results: dict[int, Results] = {}

    def once(self, number: int, compute: Callable[[], Results]) -> Results:
        """The results of `compute`, which only the first of two passes runs.

        Args:
            number: tells results of one part of the model from another.
            compute: gives at least one tensor, outside autograd.
        """
        known = self._results.get(number)
        if known:
            self._results[number] = ()
            return known
        results = compute()
        if known is None:
            # Detached: autograd will give the results themselves a history, which holds this.
            self._results[number] = tuple(each.detach() for each in results)
        return results


def compute_once(kept: Kept | None, number: int, compute: Callable[[], Results]) -> Results:
    """`Kept.once`, or without it plainly the results."""
    return compute() if kept is None else kept.once(number, compute)
