"""BAdam: AdamW on one block of layers at a time (arXiv 2404.02827, algorithm 1).

Gradients, moments and float32 masters exist for the active block alone. After K steps comes the
next one, with moments of zero. Which block a step trains depends on its number alone, so a resumed
run trains the same ones. Only while a step's forward and backward run do the other weights stop to
require gradients; checkpoints always see all of them.

The masters of bfloat16 weights go with their block: what they knew beyond bfloat16 is rounded
stochastically into the weights, as after every update.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tunesmith.ops.optim import FlatOptimizer, FlatSettings, NamedParameter, seed_from
from tunesmith.ops.rules.adamw import AdamWSettings, build_flat_adamw

BlockOrder = Literal["random", "ascending", "descending"]
PERIOD = "period"


@dataclass(frozen=True)
class BadamSettings:
    """What defines the order and the updates.

    Args:
        adamw: of the active block.
        flat: of the active block; its seed is also that of the order.
        switch_every: steps with one block: K.
        order: of the blocks. Random ones are drawn anew each time all have had their turn.
    """

    adamw: AdamWSettings
    flat: FlatSettings
    switch_every: int = 100
    order: BlockOrder = "random"


class BlockAdamW:
    """An `Optimizer` that trains one block at a time; it begins with that of step 0."""

    def __init__(
        self,
        blocks: Sequence[Sequence[NamedParameter]],
        outside: Sequence[NamedParameter],
        settings: BadamSettings,
    ) -> None:
        """Takes all blocks, and what is in none of them, which is never trained."""
        self.blocks = blocks
        self.outside = outside
        self.settings = settings
        self.is_updating = False
        self.period = 0
        self.active = self._open(0)

    @contextmanager
    def at_step(self, step: int) -> Generator[None]:
        """Makes the step's block the active one; inside, only its weights require gradients."""
        period = step // self.settings.switch_every
        if period != self.period:
            self._switch(period)
        frozen = [p for named in (*self._others(), self.outside) for _, p in named]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def zero_grad(self) -> None:
        """Sets the active block's gradients to 0 in place."""
        self.active.zero_grad()

    def clip(self, limit: float | None) -> torch.Tensor:
        """Scales the active block's gradients to a norm of at most `limit`."""
        return self.active.clip(limit)

    def step(self, learning_rate: float, is_good: torch.Tensor) -> None:
        """Updates the active block, unless this step's numbers are bad."""
        self.is_updating = True
        self.active.step(learning_rate, is_good)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The active block's, and how many blocks came before it."""
        return {PERIOD: torch.tensor(self.period), **self.active.tensors()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave, with its block as the active one.

        Raises:
            ValueError: they are of another optimizer or other parameters.
        """
        if PERIOD not in tensors:
            raise ValueError("optimizer states that are not of blocks")
        period = int(tensors[PERIOD])
        if period != self.period:
            self._switch(period)
        self.active.restore({name: t for name, t in tensors.items() if name != PERIOD})

    def _switch(self, period: int) -> None:
        self.active.release()
        self.active = self._open(period)
        self.period = period

    def _open(self, period: int) -> FlatOptimizer:
        flat, number = self.settings.flat, self._number(period)
        seed = seed_from("block", flat.seed, period)
        return build_flat_adamw(self.blocks[number], self.settings.adamw, replace(flat, seed=seed))

    def _others(self) -> list[Sequence[NamedParameter]]:
        active = self._number(self.period)
        return [block for number, block in enumerate(self.blocks) if number != active]

    def _number(self, period: int) -> int:
        return block_number(period, len(self.blocks), self.settings.order, self.settings.flat.seed)


def block_number(period: int, num_blocks: int, order: BlockOrder, seed: int) -> int:
    """The block that is trained when so many came before it."""
    turn, place = divmod(period, num_blocks)
    if order == "random":
        numbers = list(range(num_blocks))
        random.Random(seed_from("order", seed, turn)).shuffle(numbers)  # noqa: S311 no secret
        return numbers[place]
    return place if order == "ascending" else num_blocks - 1 - place
