"""Validation between steps: when, on what, and in batches that fit into memory."""

from __future__ import annotations

import time
from dataclasses import replace

from tunesmith.data.loader import Loader
from tunesmith.engine.oom import TooLargeError, free_memory
from tunesmith.engine.state import TrainState
from tunesmith.engine.step import Run, evaluate_loss
from tunesmith.errors import OutOfMemoryError
from tunesmith.objectives.base import figures
from tunesmith.types import Json

MOST_PLACES = 8
"""Samples that a message names."""


def loader_of(run: Run, state: TrainState) -> Loader:
    """The loader as the state wants it: without what is excluded, in batches that fit."""
    tokens = run.loader.micro_batch_tokens
    tokens = min(tokens, state.micro_batch_tokens or tokens)
    return replace(run.loader, micro_batch_tokens=tokens, excluded=frozenset(state.excluded))


def evaluation_is_due(run: Run, state: TrainState, *, is_last: bool) -> bool:
    """Whether the recipe wants a validation at this step."""
    is_measured = run.validation is not None or run.meter is not None
    if not is_measured or state.evaluated_step == state.step:
        return False
    every = run.recipe.evaluate.every
    if state.step == 0 or is_last:
        return True
    if every is None:
        return False
    period = run.loader.steps_per_epoch if every == "epoch" else every
    return state.step % period == 0


def evaluate(run: Run, state: TrainState) -> None:
    """Runs validation, in smaller batches if memory runs out; nothing if a signal comes.

    What the meter says belongs to it, and is all there is where nothing is held out.
    """
    started = time.perf_counter()
    found = _measure(run, state)
    while isinstance(found, TooLargeError):
        tokens = found.batch.num_stored_tokens
        if len(found.batch.sample_N.unique()) < 2 and run.validation is not None:
            raise too_large(run, run.validation, found)
        state.validation_tokens = max(1, min(tokens, state.validation_tokens or tokens) // 2)
        free_memory(run.device)
        message = (
            f"out of memory at {tokens:,} tokens of validation at once: half of it from now on"
        )
        run.events.emit("warning", state.step, {"message": message})
        found = _measure(run, state)
    metered = run.meter.measure(state.step) if found is not None and run.meter else {}
    if found is None or metered is None:
        return
    facts: dict[str, Json] = {**found, **metered}
    if "loss" in found:
        is_best = state.record_evaluation(found["loss"])
        facts = {"loss": found["loss"], "best": is_best, **facts}
    state.evaluated_step = state.step
    facts["seconds"] = round(time.perf_counter() - started, 2)
    run.events.emit("evaluation", state.step, facts)
    message = run.meter.warning(metered) if run.meter else None
    if message:
        run.events.emit("warning", state.step, {"message": message})


def _measure(run: Run, state: TrainState) -> dict[str, float] | TooLargeError | None:
    """The loss and the objective's figures; nothing without anything held out; None if stopped."""
    if run.validation is None:
        return {}
    if run.rollouts is not None:
        return run.rollouts.measure(state.step, run.is_stopped)
    tokens = state.validation_tokens or loader_of(run, state).micro_batch_tokens
    held_out = replace(run.validation, micro_batch_tokens=tokens)
    try:
        found = evaluate_loss(run, held_out.all_batches(), lambda: run.stop.received is not None)
    except TooLargeError as problem:
        return problem.with_traceback(None)
    if found is None:
        return None
    loss, *metrics = found
    return {"loss": loss, **figures(run.objective, metrics)}


def stops_early(run: Run, state: TrainState) -> bool:
    """Whether validation has not got better for too long."""
    patience = run.recipe.evaluate.early_stopping
    return patience is not None and state.evaluations_without_best >= patience


def too_large(run: Run, loader: Loader, problem: TooLargeError) -> OutOfMemoryError:
    """The error for a micro-batch that cannot be cut any more; names its samples."""
    tokens = problem.batch.num_stored_tokens
    samples = list(dict.fromkeys(problem.batch.sample_N.tolist()))[:MOST_PLACES]
    needed = problem.asked or f"about {run.peak_bytes(tokens) / 2**30:.2f} GiB in all"
    return OutOfMemoryError(
        "memory.one-sample",
        ", ".join(str(origin) for origin in loader.origins(samples)),
        found=f"no memory for its {tokens:,} tokens (needed: {needed})",
        expected="a sample that fits",
        try_="train.checkpointing=full, a smaller data.max_length, or model.quantize=nf4",
    )
