"""The training loop: one for all objectives.

A step is: global batch -> micro-batches forward and backward -> clip -> update. None of it waits
for the device: batches are prepared ahead, and loss and norm are read a step later.
Validation and checkpoints happen between steps only, so a restart always begins at a step boundary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.auto import number
from tunesmith.config.recipe import Recipe
from tunesmith.data.loader import Loader
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.events import EventLog
from tunesmith.engine.prefetch import prefetch_steps, prefetch_validation
from tunesmith.engine.readback import Arrival, open_readback
from tunesmith.engine.rng import seed_step
from tunesmith.engine.schedule import learning_rate_at
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.state import TrainState
from tunesmith.errors import Interrupted, NumbersError, RunError
from tunesmith.objectives.base import Objective
from tunesmith.ops.optim import FlatAdamW
from tunesmith.types import GlobalBatch, Json, PackedBatch


@dataclass(frozen=True)
class Run:
    """All parts of a run, put together by `train.py`.

    `validation` gives the validation batches anew on each call, or is None.
    """

    recipe: Recipe
    model: Any
    parameters: list[tuple[str, torch.nn.Parameter]]
    objective: Objective
    optimizer: FlatAdamW
    loader: Loader
    validation: Callable[[], Iterable[PackedBatch]] | None
    checkpoints: Checkpoints
    events: EventLog
    stop: StopSignal
    device: torch.device
    autocast_dtype: torch.dtype | None
    num_steps: int
    after_step: Callable[[], object] = lambda: None
    """Called when a step is done, for what the machine needs."""

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on fp32 weights where the device is fast at it, else nothing."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


@dataclass(frozen=True)
class StepNote:
    """What the host knows of a step whose numbers are still on their way."""

    step: int
    batch: GlobalBatch


def restore(run: Run, data_key: str) -> TrainState:
    """The state of the newest whole checkpoint, with weights and optimizer put back, or a new one.

    Raises:
        CheckpointError: all checkpoints are broken.
        RunError: the data has changed since the run began (`run.data-changed`).
    """
    warnings: list[str] = []
    path = run.checkpoints.latest(warnings.append)
    for text in warnings:
        run.events.emit("warning", 0, {"message": text})
    if path is None:
        return TrainState(data_key=data_key)
    state, tensors = run.checkpoints.load(path)
    if state.data_key != data_key:
        raise RunError(
            "run.data-changed",
            str(path.parent.parent),
            found="data, template, tokenizer or base model that differ from the run's beginning",
            expected="the same, to go on exactly",
            try_="--restart trains anew, or choose another `output`",
        )
    run.optimizer.restore(tensors)
    run.events.emit("resume", state.step, {"checkpoint": path.name})
    return state


def fit(run: Run, state: TrainState) -> TrainState:
    """Trains from `state` to the end.

    Raises:
        Interrupted: a signal came; the state was saved.
        NumbersError: loss or gradient is not finite; the weights were not touched by it.
    """
    saved_step = state.step if state.step else None
    numbers = open_readback(run.device, StepNote)
    steps = range(state.step, run.num_steps)
    with prefetch_steps(run.loader.batch, steps, run.device) as batches:
        while True:
            is_last = state.step >= run.num_steps
            is_best = False
            if _evaluation_is_due(run, state, is_last=is_last):
                _record(run, state, numbers.drain())
                is_best = _evaluate(run, state)
            is_last = is_last or _stops_early(run, state)
            if saved_step != state.step and (is_last or is_best or _save_is_due(run, state)):
                _record(run, state, numbers.drain())
                _save(run, state)
                saved_step = state.step
            is_unmeasured = _evaluation_is_due(run, state, is_last=is_last)
            is_saved = saved_step == state.step or not state.step
            if run.stop.received is not None and is_saved and (not is_last or is_unmeasured):
                raise Interrupted(run.stop.received, run.recipe.output, step=state.step)
            if is_last:
                return state
            started = time.perf_counter()
            note = StepNote(state.step, next(batches))
            numbers.put(note, update(run, note.batch, note.step), started)
            state.step += 1
            _record(run, state, numbers.ready())
            run.after_step()


def update(run: Run, batch: GlobalBatch, step: int) -> torch.Tensor:
    """One optimizer step; does not wait for the device.

    If loss or norm is not finite the weights stay as they are, in this step and in all later ones;
    who reads the numbers raises.

    Returns:
        (loss per supervised weight, gradient norm before clipping), two numbers on the device.
    """
    train = run.recipe.train
    seed_step(train.seed, step)
    run.model.train()
    run.optimizer.zero_grad()
    # Divided by the weight of the whole global batch: any split into micro-batches is the same.
    weight = max(batch.supervised_weight, 1e-12)
    loss = torch.zeros((), device=run.device)
    for micro_batch in batch.micro_batches:
        if micro_batch.row_N.numel() == 0:
            continue
        with run.autocast():
            result = run.objective.step(run.model, micro_batch.to(run.device))
        (result.loss_sum / weight).backward()
        loss += result.loss_sum.detach().float() / weight
    norm = run.optimizer.clip(train.clip_norm)
    is_finite = torch.isfinite(loss) & torch.isfinite(norm)
    run.optimizer.step(learning_rate_at(train, step, run.num_steps), is_finite)
    return torch.stack((loss, norm))


def train_step(run: Run, batch: GlobalBatch, step: int) -> tuple[float, float]:
    """One optimizer step, waited for.

    Returns:
        (loss per supervised weight, gradient norm before clipping).

    Raises:
        NumbersError: one of them is not finite (`numbers.not-finite`); nothing was updated.
    """
    loss, norm = update(run, batch, step).tolist()
    _check_numbers(run, batch, step, loss, norm)
    return loss, norm


def evaluate_loss(
    run: Run, batches: Iterable[PackedBatch], should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per supervised weight, or None if stopped before the end."""
    run.model.eval()
    loss, weight = 0.0, 0.0
    sums = open_readback(run.device, float)
    with torch.no_grad(), prefetch_validation(batches, run.device) as weighed:
        for batch, batch_weight in weighed:
            if should_stop():
                return None
            if batch.row_N.numel():
                with run.autocast():
                    result = run.objective.step(run.model, batch.to(run.device))
                sums.put(batch_weight, result.loss_sum[None], time.perf_counter())
                for arrival in sums.ready():
                    loss, weight = loss + arrival.numbers[0], weight + arrival.about
    for arrival in sums.drain():
        loss, weight = loss + arrival.numbers[0], weight + arrival.about
    return loss / weight if weight else float("nan")


def _record(run: Run, state: TrainState, steps: Iterator[Arrival[StepNote]]) -> None:
    """Takes the numbers of finished steps into the state and the event stream."""
    for arrival in steps:
        step, batch, (loss, norm) = arrival.about.step, arrival.about.batch, arrival.numbers
        _check_numbers(run, batch, step, loss, norm)
        state.samples_seen += len(batch.sample_ids)
        state.tokens_seen += batch.num_tokens
        state.supervised_seen += batch.num_supervised
        state.loss_sum += loss
        state.train_seconds += arrival.seconds
        done = step + 1
        if done % run.recipe.log.every_steps == 0 or done == run.num_steps:
            data: dict[str, Json] = {
                "epoch": round(done / run.loader.steps_per_epoch, 4),
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": learning_rate_at(run.recipe.train, step, run.num_steps),
                "tokens": batch.num_tokens,
                "supervised_tokens": batch.num_supervised,
                "tokens_per_second": round(batch.num_tokens / arrival.seconds, 1),
            }
            run.events.emit("step", done, data)


def _evaluation_is_due(run: Run, state: TrainState, *, is_last: bool) -> bool:
    if run.validation is None or state.evaluated_step == state.step:
        return False
    every = run.recipe.evaluate.every
    if state.step == 0 or is_last:
        return True
    if every is None:
        return False
    period = run.loader.steps_per_epoch if every == "epoch" else every
    return state.step % period == 0


def _evaluate(run: Run, state: TrainState) -> bool:
    """Runs validation; True if it is the best so far."""
    if run.validation is None:
        return False
    started = time.perf_counter()
    loss = evaluate_loss(run, run.validation(), lambda: run.stop.received is not None)
    if loss is None:
        return False
    is_best = state.record_evaluation(loss)
    seconds = round(time.perf_counter() - started, 2)
    run.events.emit("evaluation", state.step, {"loss": loss, "best": is_best, "seconds": seconds})
    return is_best


def _stops_early(run: Run, state: TrainState) -> bool:
    patience = run.recipe.evaluate.early_stopping
    return patience is not None and state.evaluations_without_best >= patience


def _save_is_due(run: Run, state: TrainState) -> bool:
    every = number(run.recipe.checkpoint.every_steps)
    return state.step > 0 and (state.step % every == 0 or run.stop.received is not None)


def _save(run: Run, state: TrainState) -> None:
    path = run.checkpoints.save(state, run.optimizer.tensors())
    run.events.emit("checkpoint", state.step, {"path": f"checkpoints/{path.name}"})


def _check_numbers(run: Run, batch: GlobalBatch, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    places = ", ".join(str(origin) for origin in run.loader.origins(batch.sample_ids)[:8])
    raise NumbersError(
        "numbers.not-finite",
        f"step {step + 1}",
        found=f"loss {loss}, gradient norm {norm} (samples {places})",
        expected="finite numbers; the weights were left as they were before this step",
        try_="lower train.learning_rate, or look at these samples with `tunesmith preview`",
    )
