"""The training loop: one for all objectives.

A step is: global batch -> micro-batches forward and backward -> check -> clip -> update. Validation
and checkpoints happen between steps only, so a restart always begins at a step boundary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.auto import number
from tunesmith.config.recipe import Recipe
from tunesmith.data.loader import Loader
from tunesmith.engine.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from tunesmith.engine.events import EventLog
from tunesmith.engine.rng import seed_step
from tunesmith.engine.schedule import learning_rate_at
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.state import TrainState
from tunesmith.errors import Interrupted, NumbersError, RunError
from tunesmith.objectives.base import Objective
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
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: Callable[[], Iterable[PackedBatch]] | None
    checkpoints: Checkpoints
    events: EventLog
    stop: StopSignal
    device: torch.device
    autocast_dtype: torch.dtype | None
    num_steps: int

    @property
    def names(self) -> dict[int, str]:
        """Parameter names by id."""
        return {id(parameter): name for name, parameter in self.parameters}

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on fp32 weights where the device is fast at it, else nothing."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


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
    restore_optimizer(run.optimizer, tensors, run.names)
    run.events.emit("resume", state.step, {"checkpoint": path.name})
    return state


def fit(run: Run, state: TrainState) -> TrainState:
    """Trains from `state` to the end.

    Raises:
        Interrupted: a signal came; the state was saved.
        NumbersError: loss or gradient is not finite; the weights were not touched by it.
    """
    saved_step = state.step if state.step else None
    while True:
        is_last = state.step >= run.num_steps
        is_best = False
        if _evaluation_is_due(run, state, is_last=is_last):
            is_best = _evaluate(run, state)
        is_last = is_last or _stops_early(run, state)
        if saved_step != state.step and (is_last or is_best or _save_is_due(run, state)):
            _save(run, state)
            saved_step = state.step
        is_unmeasured = _evaluation_is_due(run, state, is_last=is_last)
        if run.stop.received is not None and (not is_last or is_unmeasured):
            raise Interrupted(run.stop.received, run.recipe.output, step=state.step)
        if is_last:
            return state
        _train_step(run, state)


def train_step(run: Run, batch: GlobalBatch, step: int) -> tuple[float, float]:
    """One optimizer step.

    Returns:
        (loss per supervised weight, gradient norm before clipping).

    Raises:
        NumbersError: one of them is not finite (`numbers.not-finite`); nothing was updated.
    """
    train = run.recipe.train
    seed_step(train.seed, step)
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
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
    tensors = [parameter for _, parameter in run.parameters]
    limit = train.clip_norm if train.clip_norm is not None else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(tensors, limit)
    loss_value, norm_value = float(loss), float(norm)
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise _not_finite(run, batch, step, loss_value, norm_value)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(train, step, run.num_steps)
    run.optimizer.step()
    return loss_value, norm_value


def evaluate_loss(
    run: Run, batches: Iterable[PackedBatch], should_stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per supervised weight, or None if stopped before the end."""
    run.model.eval()
    loss, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            if should_stop():
                return None
            if batch.row_N.numel():
                with run.autocast():
                    result = run.objective.step(run.model, batch.to(run.device))
                loss += float(result.loss_sum)
                weight += float(batch.weight_N.double().sum())
    return loss / weight if weight else float("nan")


def _train_step(run: Run, state: TrainState) -> None:
    started = time.perf_counter()
    step = state.step
    batch = run.loader.batch(step)
    loss, norm = train_step(run, batch, step)
    seconds = time.perf_counter() - started
    state.step += 1
    state.samples_seen += len(batch.sample_ids)
    state.tokens_seen += batch.num_tokens
    state.supervised_seen += batch.num_supervised
    state.loss_sum += loss
    state.train_seconds += seconds
    if state.step % run.recipe.log.every_steps == 0 or state.step == run.num_steps:
        data: dict[str, Json] = {
            "epoch": round(state.step / run.loader.steps_per_epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate_at(run.recipe.train, step, run.num_steps),
            "tokens": batch.num_tokens,
            "supervised_tokens": batch.num_supervised,
            "tokens_per_second": round(batch.num_tokens / seconds, 1),
        }
        run.events.emit("step", state.step, data)


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
    path = run.checkpoints.save(state, optimizer_tensors(run.optimizer, run.names))
    run.events.emit("checkpoint", state.step, {"path": f"checkpoints/{path.name}"})


def _not_finite(run: Run, batch: GlobalBatch, step: int, loss: float, norm: float) -> NumbersError:
    places = ", ".join(str(origin) for origin in run.loader.origins(batch.sample_ids)[:8])
    return NumbersError(
        "numbers.not-finite",
        f"step {step + 1}",
        found=f"loss {loss}, gradient norm {norm} (samples {places})",
        expected="finite numbers; the weights were left as they were before this step",
        try_="lower train.learning_rate, or look at these samples with `tunesmith preview`",
    )
