"""Samples answers from the model in training, as many at once as memory takes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from tunesmith.engine.oom import free_memory
from tunesmith.errors import OutOfMemoryError
from tunesmith.infer.sample import Drawing, Drawn, sample_answers
from tunesmith.io.fault import fault
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
        """See `Engine`; prompts of like length go together.

        Raises:
            OutOfMemoryError: one answer alone is too much (`memory.one-answer`).
        """
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers: list[list[Drawn]] = [[] for _ in prompts]
        first, asked = 0, partial(_is_stopped, is_stopped)
        while first < len(prompts):
            chosen, places = self._next(by_length, first, answers, uniform_PKL.shape[1])
            found = self._try(
                [prompts[number] for number in chosen],
                uniform_PKL[chosen][:, places],
                drawing,
                asked,
            )
            if found is None:
                return None
            for number, drawn in zip(chosen, found, strict=False):  # none: once more, fewer
                answers[number] += drawn
            while first < len(prompts) and len(answers[by_length[first]]) == uniform_PKL.shape[1]:
                first += 1
        return answers

    def _next(
        self, by_length: list[int], first: int, answers: list[list[Drawn]], num_answers: int
    ) -> tuple[list[int], slice]:
        """Which prompts come next, and which of their answers; some of a prompt's may be there."""
        num_there = len(answers[by_length[first]])
        if num_there or self.at_once < num_answers:
            return [by_length[first]], slice(num_there, num_there + self.at_once)
        size = self.at_once // num_answers
        return by_length[first : first + size], slice(0, num_answers)

    def _try(
        self,
        prompts: Sequence[Sequence[int]],
        uniform_PKL: torch.Tensor,
        drawing: Drawing,
        is_stopped: IsStopped,
    ) -> list[list[Drawn]] | None:
        """The answers; none at all where memory ended, which is less at once the next time."""
        count = uniform_PKL.shape[0] * uniform_PKL.shape[1]
        try:
            with self.autocast():
                return sample_answers(self.model, prompts, uniform_PKL, drawing, is_stopped)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The frames below hold keys and values; these must be gone before another try.
            traceback.clear_frames(error.__traceback__)
        if count == 1:
            raise _too_large(prompts[0], drawing)
        free_memory(self.model.device)
        self.at_once = count // 2
        return []


def _is_stopped(is_stopped: IsStopped) -> bool:
    fault("sample.token")
    return is_stopped()


def _too_large(prompt: Sequence[int], drawing: Drawing) -> OutOfMemoryError:
    return OutOfMemoryError(
        "memory.one-answer",
        "objective.max_new_tokens",
        found=f"no memory for one answer of up to {drawing.max_tokens:,} tokens "
        f"to a prompt of {len(prompt):,}",
        expected="an answer that fits",
        try_="a smaller objective.max_new_tokens or data.max_length, or model.quantize=nf4",
    )


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
