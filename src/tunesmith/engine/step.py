"""One optimizer step, and one validation: forward, backward, update. Neither waits for the device.

A step is: global batch -> micro-batches forward and backward -> clip -> update.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.recipe import Recipe
from tunesmith.data.loader import Loader
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.events import EventLog
from tunesmith.engine.oom import TooLargeError
from tunesmith.engine.prefetch import prefetch_validation
from tunesmith.engine.readback import open_readback
from tunesmith.engine.rng import seed_step
from tunesmith.engine.schedule import learning_rate_at
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.watchdog import Watchdog
from tunesmith.io.fault import fault
from tunesmith.objectives.base import Objective
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.ops.optim import FlatAdamW
from tunesmith.types import GlobalBatch, PackedBatch


@dataclass(frozen=True)
class Run:
    """All parts of a run, put together by `train.py`.

    `validation` is the loader of what is held out, or None; `peak_bytes` predicts the memory of a
    micro-batch of so many tokens.
    """

    recipe: Recipe
    model: Any
    parameters: list[tuple[str, torch.nn.Parameter]]
    objective: Objective
    optimizer: FlatAdamW
    loader: Loader
    validation: Loader | None
    checkpoints: Checkpoints
    events: EventLog
    stop: StopSignal
    watchdog: Watchdog
    device: torch.device
    autocast_dtype: torch.dtype | None
    num_steps: int
    peak_bytes: Callable[[int], int]
    after_step: Callable[[], object] = lambda: None
    """Called when a step is done, for what the machine needs."""

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on fp32 weights where the device is fast at it, else nothing."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def update(
    run: Run, batch: GlobalBatch, step: int, *, highest_loss: float = math.inf
) -> torch.Tensor | None:
    """One optimizer step; does not wait for the device.

    If loss or norm is not finite, or the loss is too high, the weights stay as they are; who reads
    the numbers finds out. A batch without supervised tokens changes nothing.

    Args:
        run: the run.
        batch: on the device.
        step: its number, from 0.
        highest_loss: to be learned from.

    Returns:
        (loss per supervised weight, gradient norm before clipping, 1 if weights were updated), on
        the device. None if a signal came: then the step was dropped, and nothing of it remains.

    Raises:
        TooLargeError: memory did not suffice for a micro-batch; nothing of the step remains.
    """
    train = run.recipe.train
    seed_step(train.seed, step)
    run.model.train()
    run.optimizer.zero_grad()
    loss = torch.zeros((), device=run.device)
    if not batch.supervised_weight:
        return torch.stack((loss, loss, loss))
    for micro_batch in batch.micro_batches:
        if run.stop.received is not None:
            return None
        run.watchdog.beat("step")
        if micro_batch.row_N.numel():
            # Divided by the weight of the whole global batch: any split is the same.
            loss += _forward_backward(run, micro_batch, batch.supervised_weight, step)
    norm = run.optimizer.clip(train.clip_norm)
    is_good = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= highest_loss)
    fault("step.update", step=step)
    run.optimizer.step(learning_rate_at(train, step, run.num_steps), is_good)
    return torch.stack((loss, norm, is_good.to(loss.dtype)))


def _forward_backward(run: Run, batch: PackedBatch, weight: float, step: int) -> torch.Tensor:
    """Adds the gradients of a micro-batch up; returns its share of the loss."""
    tokens = batch.num_stored_tokens
    try:
        factor = fault("step.micro", step=step, tokens=tokens, samples=batch.sample_N.tolist)
        with run.autocast():
            result = run.objective.step(run.model, batch.to(run.device))
        share = result.loss_sum / weight
        if factor != 1.0:
            share = share * factor
        fault("step.backward", step=step, tokens=tokens)
        share.backward()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames below hold all that the forward kept; it must be gone before another try.
        traceback.clear_frames(error.__traceback__)
        raise TooLargeError(batch, str(error)) from None
    return share.detach().float()


def evaluate_loss(
    run: Run, batches: Iterable[PackedBatch], should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per supervised weight, or None if stopped before the end.

    Raises:
        TooLargeError: memory did not suffice for a batch.
    """
    run.model.eval()
    loss, weight = 0.0, 0.0
    sums = open_readback(run.device, float)
    with torch.no_grad(), prefetch_validation(batches, run.device) as weighed:
        for batch, batch_weight in weighed:
            if should_stop():
                return None
            run.watchdog.beat("evaluation")
            if batch.row_N.numel():
                sums.put(batch_weight, _measure(run, batch), time.perf_counter())
                for arrival in sums.ready():
                    loss, weight = loss + arrival.numbers[0], weight + arrival.about
    for arrival in sums.drain():
        loss, weight = loss + arrival.numbers[0], weight + arrival.about
    return loss / weight if weight else float("nan")


def _measure(run: Run, batch: PackedBatch) -> torch.Tensor:
    try:
        fault("eval.batch", tokens=batch.num_stored_tokens)
        with run.autocast():
            return run.objective.step(run.model, batch.to(run.device)).loss_sum[None]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise TooLargeError(batch, str(error)) from None
