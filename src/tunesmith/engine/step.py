"""One optimizer step, and one validation: forward, backward, update. Neither waits for the device.

A step is: global batch -> micro-batches forward and backward -> clip -> update.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tunesmith.config.recipe import Recipe
from tunesmith.data.loader import Loader
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.events import EventLog
from tunesmith.engine.oom import TooLargeError
from tunesmith.engine.prefetch import prefetch_validation
from tunesmith.engine.readback import open_readback
from tunesmith.engine.rng import seed_step
from tunesmith.engine.sample_losses import SampleLosses, SampleSums
from tunesmith.engine.schedule import learning_rate_at
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.watchdog import Watchdog
from tunesmith.io.fault import fault
from tunesmith.objectives.base import LooksAhead, Objective, StepResult
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.ops.optim import Optimizer
from tunesmith.types import GlobalBatch, PackedBatch


class Rollouts(Protocol):
    """What turns prompts into answers that the model samples, for objectives that learn from these.

    It asks `is_stopped` as often as it can, and then gives up, with None.
    """

    def batch(
        self, given: GlobalBatch, step: int, budget: int, is_stopped: Callable[[], bool]
    ) -> GlobalBatch | None:
        """What a step learns from, given the samples whose prompts are answered.

        Raises:
            TooLargeError: memory did not suffice for a micro-batch.
        """
        ...

    def packed(self, step: int, budget: int) -> GlobalBatch:
        """The same in micro-batches of at most `budget` tokens, after `batch` for this step."""
        ...

    def measure(self, step: int, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Figures of answers to what is held out, `loss` first among them."""
        ...


class Meter(Protocol):
    """What else is measured of the model whenever it is validated."""

    def measure(self, step: int) -> dict[str, float] | None:
        """Figures by name; None if it was stopped."""
        ...

    def warning(self, found: dict[str, float]) -> str | None:
        """What must be said of them, if anything."""
        ...


@dataclass(frozen=True)
class Run:
    """All parts of a run, put together by `train.py`.

    `validation` is the loader of what is held out, or None; `peak_bytes` predicts the memory of a
    micro-batch of so many tokens; `rollouts` is None where the data itself is learned from.
    """

    recipe: Recipe
    model: Any
    parameters: list[tuple[str, torch.nn.Parameter]]
    objective: Objective
    optimizer: Optimizer
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
    rollouts: Rollouts | None = None
    meter: Meter | None = None
    losses: SampleLosses | None = None

    def is_stopped(self) -> bool:
        """Whether a signal came; also says that the run is alive."""
        self.watchdog.beat("sample")
        return self.stop.received is not None

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on fp32 weights where the device is fast at it, else nothing."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def plain_autocast(self) -> AbstractContextManager[Any]:
        """For transformers' own forward, which wants one type: that of the weights.

        Adapters stay in float32, whatever the weights are.
        """
        is_half = self.recipe.model.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half)


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
        (loss per supervised weight, gradient norm before clipping, 1 if weights were updated, the
        objective's metrics, and the loss of each sample in the order of `distinct` where the
        objective knows it), on the device. None if a signal came: then the step was dropped, and
        nothing of it remains.

    Raises:
        TooLargeError: memory did not suffice for a micro-batch; nothing of the step remains.
    """
    train = run.recipe.train
    seed_step(train.seed, step)
    run.model.train()
    run.optimizer.zero_grad()
    names = run.objective.metric_names
    loss, metrics = torch.zeros((), device=run.device), torch.zeros(len(names), device=run.device)
    if not batch.supervised_weight:
        return torch.cat((loss.expand(3), metrics))
    run, samples = _prepared(run, batch), SampleSums(batch.sample_ids, run.device)
    for micro_batch in batch.micro_batches:
        if run.stop.received is not None:
            return None
        run.watchdog.beat("step")
        if micro_batch.row_N.numel():
            # Divided by the weight of the whole global batch: any split is the same.
            with run.optimizer.at_step(step):
                share, result = _forward_backward(run, micro_batch, batch.supervised_weight, step)
            samples.add(micro_batch, result.loss_N)
            metrics = metrics + _stacked(run, result) / batch.supervised_weight
            loss = loss + share
    norm = run.optimizer.clip(train.clip_norm)
    is_good = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= highest_loss)
    fault("step.update", step=step)
    run.optimizer.step(learning_rate_at(train, step, run.num_steps), is_good)
    head = torch.stack((loss, norm, is_good.to(loss.dtype)))
    return torch.cat((head, metrics, samples.means()))


def _prepared(run: Run, batch: GlobalBatch) -> Run:
    """The run with its objective made ready for the step, where that must see all of it first."""
    objective, found = run.objective, list[torch.Tensor]()
    if not isinstance(objective, LooksAhead) or not objective.looks_ahead:
        return run
    if len(batch.micro_batches) == 1:  # the step itself sees all there is
        return run
    for micro_batch in batch.micro_batches:
        if run.stop.received is not None:
            return run
        run.watchdog.beat("step")
        try:
            with run.autocast():
                found.append(objective.look_ahead(run.model, micro_batch.to(run.device)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            raise TooLargeError(micro_batch, str(error)) from None
    return replace(run, objective=objective.prepared(found))


def _forward_backward(
    run: Run, batch: PackedBatch, weight: float, step: int
) -> tuple[torch.Tensor, StepResult]:
    """Adds the gradients of a micro-batch up; returns its share of the loss, and what was found."""
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
    return share.detach().float(), replace(result, loss_sum=result.loss_sum.detach())


def _stacked(run: Run, result: StepResult) -> torch.Tensor:
    names = run.objective.metric_names
    if not names:
        return torch.zeros(0, device=run.device)
    return torch.stack([result.metrics[name].detach().float() for name in names])


def evaluate_loss(
    run: Run, batches: Iterable[PackedBatch], should_stop: Callable[[], bool] = lambda: False
) -> list[float] | None:
    """Mean loss per supervised weight, then the metrics' means; None if stopped before the end.

    Raises:
        TooLargeError: memory did not suffice for a batch.
    """
    run.model.eval()
    total, weight = [0.0] * (1 + len(run.objective.metric_names)), 0.0
    sums = open_readback(run.device, float)
    with torch.no_grad(), prefetch_validation(batches, run.device) as weighed:
        for batch, batch_weight in weighed:
            if should_stop():
                return None
            run.watchdog.beat("evaluation")
            if batch.row_N.numel():
                sums.put(batch_weight, _measure(run, batch), time.perf_counter())
                for arrival in sums.ready():
                    total, weight = _added(total, arrival.numbers), weight + arrival.about
    for arrival in sums.drain():
        total, weight = _added(total, arrival.numbers), weight + arrival.about
    return [each / weight if weight else math.nan for each in total]


def _added(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _measure(run: Run, batch: PackedBatch) -> torch.Tensor:
    try:
        fault("eval.batch", tokens=batch.num_stored_tokens)
        with run.autocast():
            result = run.objective.step(run.model, batch.to(run.device))
        return torch.cat((result.loss_sum.detach().float()[None], _stacked(run, result)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise TooLargeError(batch, str(error)) from None
