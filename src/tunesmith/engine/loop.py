"""The training loop: one for all objectives.

Batches are prepared ahead, loss and norm are read a step later. Validation and checkpoints happen
between steps only, so a restart always begins at a step boundary. Whatever ends the loop, what it
has learned is saved first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from tunesmith.config.auto import number
from tunesmith.data.loader import Loader
from tunesmith.engine.guards import (
    accept_losses,
    highest_loss,
    must_roll_back,
    record_loss,
    record_skip,
    rolled_back,
)
from tunesmith.engine.oom import TooLargeError, free_memory, smaller_budget
from tunesmith.engine.prefetch import prefetch_steps
from tunesmith.engine.readback import Arrival, Readback, open_readback
from tunesmith.engine.schedule import learning_rate_at
from tunesmith.engine.state import TrainState
from tunesmith.engine.step import Run, update
from tunesmith.engine.validation import (
    MOST_PLACES,
    evaluate,
    evaluation_is_due,
    loader_of,
    stops_early,
    too_large,
)
from tunesmith.errors import (
    DiskError,
    Interrupted,
    NumbersError,
    RunError,
    TunesmithError,
)
from tunesmith.objectives.base import figures
from tunesmith.types import GlobalBatch, Json

MOST_EXCLUDED = 0.5
"""Share of the samples: if more are bad, it is not the samples."""


@dataclass(frozen=True)
class StepNote:
    """What the host knows of a step whose numbers are still on their way."""

    step: int
    batch: GlobalBatch


@dataclass
class Progress:
    """Where `fit` is; the state in it is all that a checkpoint needs.

    Args:
        state: of the run.
        saved_step: of the newest checkpoint, None if there is none.
        is_scheduled: whether the uninterrupted run has that checkpoint, too.
        numbers: of steps whose numbers are on their way.
    """

    state: TrainState
    saved_step: int | None
    is_scheduled: bool
    numbers: Readback[StepNote]


def restore(
    run: Run,
    fingerprints: dict[str, str],
    recipe_changes: Sequence[str] = (),
    *,
    allow_changes: bool = False,
) -> TrainState:
    """The state of the newest whole checkpoint, with weights and optimizer put back, or a new one.

    Args:
        run: whose model and optimizer take what is read.
        fingerprints: of model and data as they are now.
        recipe_changes: what the recipe asks for otherwise: then the guards begin anew.
        allow_changes: go on even if the fingerprints differ from the run's beginning.

    Raises:
        CheckpointError: all checkpoints are broken, or hold other weights.
        RunError: the data has changed since the run began (`run.data-changed`).
    """
    run.watchdog.beat("load", 0)
    warnings: list[str] = []
    path = run.checkpoints.latest(warnings.append)
    for text in warnings:
        run.events.emit("warning", 0, {"message": text})
    if path is None:
        return TrainState(fingerprints)
    state = run.checkpoints.load(path)
    changed = state.differing(fingerprints)
    if changed and not allow_changes:
        raise RunError(
            "run.data-changed",
            str(path.parent.parent),
            found=f"another content than at the run's beginning: {', '.join(changed)}",
            expected="the same, to go on exactly",
            try_="--allow-changes goes on all the same, --restart trains anew",
        )
    if changed:
        state.fingerprints, state.excluded = fingerprints, []  # other rows have these numbers now
    if changed or recipe_changes:
        state.num_rollbacks, state.bad_steps = 0, []
    facts: dict[str, Json] = {"checkpoint": path.name, "changed": list(changed)}
    run.events.emit("resume", state.step, facts)
    return state


def fit(run: Run, state: TrainState) -> TrainState:
    """Trains from `state` to the end.

    Raises:
        Interrupted: a signal came; the state was saved.
        NumbersError: losses or gradients stay bad; no weight was touched by one.
        OutOfMemoryError: one sample alone is too much.
        DiskError: a checkpoint could not be written, twice.
    """
    numbers = open_readback(run.device, StepNote)
    saved_step = state.step if state.step else None
    progress = Progress(state, saved_step, run.checkpoints.is_scheduled(state.step), numbers)
    with _last_words(run, progress):
        while not _train_on(run, progress):
            # A rollback or a lack of memory: the batches from here on are other ones.
            run.watchdog.beat("data", progress.state.step)
        _collect(run, progress.state, wait=True)
    return progress.state


def _train_on(run: Run, progress: Progress) -> bool:
    """Trains while batches stay as planned; True at the end of the run."""
    state, numbers = progress.state, progress.numbers
    loader = loader_of(run, state)
    with prefetch_steps(loader.batch, range(state.step, run.num_steps), run.device) as batches:
        while True:
            is_end = _between_steps(run, progress)
            if must_roll_back(state, run.recipe.guard):
                _roll_back(run, progress)
                return False
            if is_end:
                return True
            run.watchdog.beat("data", state.step)
            given, started = next(batches), time.perf_counter()
            run.watchdog.beat("step", state.step, _places(run, given.sample_ids))
            found = _update(run, given, state, loader.micro_batch_tokens)
            if isinstance(found, TooLargeError):
                _record(run, state, numbers.drain())
                _take_less(run, state, loader, found)
                return False
            if found is not None:
                numbers.put(*found, started)
                state.step += 1
                run.optimizer.is_updating = False
                _record(run, state, numbers.ready())
                run.after_step()


def _update(
    run: Run, given: GlobalBatch, state: TrainState, budget: int
) -> tuple[StepNote, torch.Tensor] | TooLargeError | None:
    """A step on a batch, or on answers to it that are sampled first; None if a signal came."""
    limit = highest_loss(state, state.step, run.recipe.guard)
    batch: GlobalBatch | None = given
    try:
        if run.rollouts is not None:
            batch = run.rollouts.batch(given, state.step, budget, run.is_stopped)
            run.after_step()  # a cache of keys and values leaves holes in the heap
        found = batch and update(run, batch, state.step, highest_loss=limit)
    except TooLargeError as problem:
        # Without the frames, which hold all that the forward kept: it must be gone before a retry.
        return problem.with_traceback(None)
    if batch is None or found is None:
        return None
    return StepNote(state.step, batch), found


def _between_steps(run: Run, progress: Progress) -> bool:
    """Measures, saves, or stops, as is due; True if this is the end."""
    state, numbers = progress.state, progress.numbers
    _collect(run, state, wait=False)
    is_last = state.step >= run.num_steps
    if evaluation_is_due(run, state, is_last=is_last):
        _record(run, state, numbers.drain())
        evaluate(run, state)
    is_last = is_last or stops_early(run, state)
    is_stopping = run.stop.received is not None
    is_best = state.step > 0 and state.best_step == state.step
    is_scheduled = is_last or is_best or _save_is_scheduled(run, state)
    is_saved = progress.saved_step == state.step
    # A signal or an error may have saved this step before the uninterrupted run would have.
    is_due = is_scheduled and not (is_saved and progress.is_scheduled)
    if is_due or (_save_is_asked(run, state) and not is_saved):
        _record(run, state, numbers.drain())
        # What is about to be rolled back is not worth keeping.
        if not must_roll_back(state, run.recipe.guard):
            is_scheduled = is_scheduled and not state.bad_steps
            _save(run, progress, is_scheduled=is_scheduled, wait=is_stopping)
    is_unmeasured = evaluation_is_due(run, state, is_last=is_last)
    # Not saved: the signal came a moment ago; the next time around it is.
    is_saved = progress.saved_step == state.step or not state.step
    if is_stopping and is_saved and (not is_last or is_unmeasured):
        _collect(run, state, wait=True)
        raise Interrupted(run.stop.received or 0, run.recipe.output, step=state.step)
    return is_last


@contextmanager
def _last_words(run: Run, progress: Progress) -> Generator[None]:
    """Saves the last whole step when something breaks the loop, whatever it is."""
    is_broken = True
    try:
        yield
        is_broken = False
    except (Interrupted, NumbersError):  # after a save; of what must not be saved
        is_broken = False
        with suppress(DiskError):
            _collect(run, progress.state, wait=True)
        raise
    finally:
        if is_broken:
            _save_last_step(run, progress)


def _save_last_step(run: Run, progress: Progress) -> None:
    state = progress.state
    # What broke the loop is what the user must see, not that its last words failed, too.
    with suppress(TunesmithError, OSError, RuntimeError, MemoryError):
        _record(run, state, progress.numbers.drain())
        _collect(run, state, wait=True)
        if state.step and progress.saved_step != state.step and not run.optimizer.is_updating:
            _save(run, progress, is_scheduled=False, wait=True)
            message = f"saved at step {state.step} before the run broke off"
            run.events.emit("warning", state.step, {"message": message})


# Numbers


def _record(run: Run, state: TrainState, steps: Iterator[Arrival[StepNote]]) -> None:
    """Takes the numbers of finished steps into the state and the event stream."""
    for arrival in steps:
        step, batch = arrival.about.step, arrival.about.batch
        loss, norm, is_good, *rest = arrival.numbers
        num_metrics = len(run.objective.metric_names)
        metrics, sample_losses = rest[:num_metrics], rest[num_metrics:]
        state.samples_seen += len(batch.sample_ids)
        state.tokens_seen += batch.num_tokens
        state.supervised_seen += batch.num_supervised
        state.train_seconds += arrival.seconds
        done = step + 1
        if not batch.supervised_weight:
            state.num_empty += 1
        elif is_good:
            record_loss(state, step, loss, run.recipe.guard)
            _keep_losses(run, done, batch, sample_losses)
        else:
            limit = highest_loss(state, step, run.recipe.guard)
            record_skip(state, batch.sample_ids, is_finite=math.isfinite(loss + norm))
            _say_skipped(run, arrival, limit)
        if done % run.recipe.log.every_steps == 0 or done == run.num_steps:
            data: dict[str, Json] = {
                "epoch": round(done / run.loader.steps_per_epoch, 4),
                "loss": loss,
                **batch.facts,
                **figures(run.objective, metrics),
                "grad_norm": norm,
                "learning_rate": learning_rate_at(run.recipe.train, step, run.num_steps),
                "tokens": batch.num_tokens,
                "supervised_tokens": batch.num_supervised,
                "tokens_per_second": round(batch.num_tokens / arrival.seconds, 1),
            }
            run.events.emit("step", done, data)


def _keep_losses(run: Run, step: int, batch: GlobalBatch, losses: Sequence[float]) -> None:
    """Writes down what each sample of a step lost."""
    if run.losses is not None:
        message = run.losses.record(step, batch.epoch, batch.sample_ids, losses)
        if message is not None:
            run.events.emit("warning", step, {"message": message})


def _say_skipped(run: Run, arrival: Arrival[StepNote], limit: float) -> None:
    step, (loss, norm, *_) = arrival.about.step, arrival.numbers
    reason = f"the loss leaps above {limit:.4g}" if loss > limit else "not finite"
    places = _places(run, arrival.about.batch.sample_ids)
    message = f"step {step + 1} is not learned from: loss {loss:.4g}, gradient norm {norm:.4g}"
    facts: dict[str, Json] = {"loss": loss, "grad_norm": norm, "samples": list(places)}
    facts["message"] = f"{message} ({reason}; samples {', '.join(places)})"
    run.events.emit("skip", step + 1, facts)


def _places(run: Run, sample_ids: Sequence[int]) -> list[str]:
    return [str(origin) for origin in run.loader.origins(sample_ids[:MOST_PLACES])]


def _roll_back(run: Run, progress: Progress) -> None:
    """Goes back to the last scheduled checkpoint, without the samples of the bad steps.

    Raises:
        NumbersError: that was done often enough (`numbers.bad-steps`).
    """
    state = progress.state
    guard = run.recipe.guard
    # Not a step more than the uninterrupted run knows of, whose numbers may come later.
    state.bad_steps = state.bad_steps[: guard.rollback_after]
    bad = [sample for step in state.bad_steps for sample in step]
    places = ", ".join(_places(run, bad))
    is_hopeless = len({*bad, *state.excluded}) > MOST_EXCLUDED * len(run.loader.samples)
    if state.num_rollbacks >= guard.rollbacks or is_hopeless:
        if state.bad_are_finite:
            accept_losses(state)
            message = "losses stay as high as those left out: they are learned from again"
            run.events.emit("warning", state.step, {"message": f"{message} (samples {places})"})
            return
        raise NumbersError(
            "numbers.bad-steps",
            f"step {state.step}",
            found=f"{len(state.bad_steps)} steps in a row with bad losses or gradients, "
            f"after {state.num_rollbacks} rollbacks (samples {places})",
            expected="finite numbers; no weight was updated with a bad one",
            try_="lower train.learning_rate, or look at these samples with `tunesmith preview`",
        )
    _collect(run, state, wait=True)
    path = run.checkpoints.latest_scheduled()
    target = None
    if path is not None:
        target = run.checkpoints.load(path)
        run.checkpoints.remove_after(target.step)
    new = rolled_back(state, target)
    progress.state = new
    progress.saved_step, progress.is_scheduled = (new.step, True) if target else (None, False)
    progress.numbers = open_readback(run.device, StepNote)  # of steps that are no more
    back = f"back to step {new.step}" if target is not None else "going on"
    message = f"{len(state.bad_steps)} bad steps in a row: {back} without samples {places}"
    run.events.emit("rollback", state.step, {"to": new.step, "message": message})


def _take_less(run: Run, state: TrainState, loader: Loader, problem: TooLargeError) -> None:
    """Halves the tokens of a micro-batch after memory ran out.

    Raises:
        OutOfMemoryError: what did not fit is one sample already.
    """
    tokens = problem.batch.num_stored_tokens

    def packed(budget: int) -> GlobalBatch:
        if run.rollouts is not None:
            return run.rollouts.packed(state.step, budget)
        return replace(loader, micro_batch_tokens=budget).batch(state.step)

    budget = smaller_budget(packed, tokens)
    if budget is None:
        raise too_large(run, loader, problem)
    free_memory(run.device)
    state.micro_batch_tokens = budget
    message = f"out of memory at {tokens:,} tokens at once: at most {budget:,} from now on"
    run.events.emit("warning", state.step, {"message": f"{message}, the same samples in a step"})


# Checkpoints


def _save_is_scheduled(run: Run, state: TrainState) -> bool:
    # Not among bad steps: a rollback must find what was there before them.
    every = number(run.recipe.checkpoint.every_steps)
    return state.step > 0 and state.step % every == 0 and not state.bad_steps


def _save_is_asked(run: Run, state: TrainState) -> bool:
    wants_save, run.stop.wants_save = run.stop.wants_save, False
    return state.step > 0 and (wants_save or run.stop.received is not None)


def _save(run: Run, progress: Progress, *, is_scheduled: bool, wait: bool) -> None:
    """Begins a checkpoint of this step; one that is under way is waited for."""
    state = progress.state
    with run.watchdog.during("save", state.step):
        _collect(run, state, wait=True)
        run.checkpoints.begin(state, is_scheduled=is_scheduled)
        progress.saved_step, progress.is_scheduled = state.step, is_scheduled
        _collect(run, state, wait=wait)


def _collect(run: Run, state: TrainState, *, wait: bool) -> None:
    """Tells of a checkpoint that is finished."""

    def warn(text: str) -> None:
        run.events.emit("warning", state.step, {"message": text})

    path = run.checkpoints.collect(warn, wait=wait)
    if path is not None:
        step = int(path.name.removeprefix("step-"))
        run.events.emit("checkpoint", step, {"path": f"checkpoints/{path.name}"})
