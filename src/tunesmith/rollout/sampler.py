"""Samples answers from the model in training, as many at once as memory takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tunesmith.infer.sample import Drawing, Drawn, sample_answers
from tunesmith.ops.memory_errors import is_out_of_memory

IsStopped = Callable[[], bool]


class Engine(Protocol):
    """What answers prompts by the model as it is now."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_PKL: torch.Tensor,
        drawing: Drawing,
        is_stopped: IsStopped,
    ) -> list[list[Drawn]] | None:
        """K answers to each prompt; None if it was stopped."""
        ...


@dataclass
class TransformersEngine:
    """The model in training itself, by transformers' forward.

    Args:
        model: it.
        autocast: what it computes in.
        at_once: answers in one batch; halved for good where memory ends.
    """

    model: Any
    autocast: Callable[[], AbstractContextManager[Any]]
    at_once: int

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_PKL: torch.Tensor,
        drawing: Drawing,
        is_stopped: IsStopped,
    ) -> list[list[Drawn]] | None:
        """See `Engine`; prompts of like length go together."""
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers: dict[int, list[Drawn]] = {}
        while len(answers) < len(prompts):
            size = max(1, self.at_once // uniform_PKL.shape[1])
            chosen = by_length[len(answers) : len(answers) + size]
            found = self._try(
                [prompts[number] for number in chosen], uniform_PKL[chosen], drawing, is_stopped
            )
            if found is None:
                return None
            answers.update(zip(chosen, found, strict=False))  # none found: once more, fewer
        return [answers[number] for number in range(len(prompts))]

    def _try(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_PKL: torch.Tensor,
        drawing: Drawing,
        is_stopped: IsStopped,
    ) -> list[list[Drawn]] | None:
        """The answers; none at all where memory ended, which is less at once the next time."""
        try:
            with self.autocast():
                return sample_answers(self.model, prompts, uniform_PKL, drawing, is_stopped)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(prompts) == 1:
                raise
            self.at_once = len(prompts) // 2 * uniform_PKL.shape[1]
            return []


def uniform_numbers(seed: int, number: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Numbers in [0, 1) for a sampling's tokens, `uniform_PKL`: the same at every restart.

    Args:
        seed: of the run.
        number: of the sampling.
        shape: P, K and L.
    """
    # numpy promises Philox's raw stream for all versions (NEP 19); 53 bits make a double.
    stream = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))
    raw = stream.random_raw(int(np.prod(shape))) >> np.uint64(11)
    return torch.from_numpy(raw.astype(np.float64) * 2.0**-53).view(shape)
