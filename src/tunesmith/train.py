"""The whole of a run on one page: config -> data -> model -> objective -> fit -> export.

Read this first; every name leads to the module that does the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunesmith.config.load import LoadedRecipe
from tunesmith.config.recipe import LoraConfig
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.events import EventLog, read_events
from tunesmith.engine.loop import Run, fit, restore
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.rng import seed_run
from tunesmith.engine.rundir import RunDirectory, open_run
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.state import TrainState
from tunesmith.evaluate.plots import plot_loss
from tunesmith.export.result import result_card, write_result
from tunesmith.io.lock import directory_lock
from tunesmith.job import Job, fit_memory, overview, prepare, validation_batches
from tunesmith.model.adapters import load_weights, save_trained
from tunesmith.model.build import build_model
from tunesmith.model.device import HeapTrimmer, PeakMemory, prepare_machine
from tunesmith.objectives import OBJECTIVES
from tunesmith.types import Json, Listener, Reporter, SilentReporter


def train(
    loaded: LoadedRecipe,
    *,
    restart: bool = False,
    reporter: Reporter | None = None,
    listeners: Sequence[Listener] = (),
) -> tuple[RunDirectory, dict[str, Json]]:
    """Runs a recipe to its end, or goes on with it; returns the run directory and its summary.

    Raises:
        TunesmithError: see `errors.py`; `Interrupted` after a signal, with all saved.
    """
    reporter = reporter or SilentReporter()
    run_dir = open_run(loaded.recipe, restart=restart)
    with directory_lock(run_dir.path):
        if run_dir.summary is not None:
            return run_dir, run_dir.summary
        job = prepare(loaded, reporter, run_dir.resolved(loaded.recipe))
        with EventLog(run_dir.events, listeners) as events, StopSignal() as stop:
            run, job, notes = build(job, run_dir, events, stop, reporter)
            run_dir.save_recipes(loaded.recipe, job.resolved.recipe, job.resolved.reasons)
            state = restore(run, job.data_key)
            events.emit("start", state.step, overview(job, loaded.recipe, notes))
            peak = PeakMemory(job.device)
            peak.begin_phase()
            state = fit(run, state)
            summary = finish(run, run_dir, job, state, peak.facts(job.predicted_bytes))
            events.emit("done", state.step, summary)
    return run_dir, summary


def build(
    job: Job, run_dir: RunDirectory, events: EventLog, stop: StopSignal, reporter: Reporter
) -> tuple[Run, Job, tuple[str, ...]]:
    """Model -> objective -> run: loads the weights and puts all parts together.

    Returns:
        the run, the job (with another plan if two small steps said so), and notes for the user.
    """
    recipe, device = job.resolved.recipe, job.device.torch_device
    prepare_machine(job.device)
    with reporter.waiting(f"Loading {job.source.label}"):
        built = build_model(
            job.source,
            recipe,
            device,
            num_tokens=job.num_tokens,
            seed=lambda: seed_run(recipe.train.seed),
        )
    options = recipe.objective.model_dump(exclude={"name"})
    make_objective = partial(OBJECTIVES[recipe.objective.name], **options)
    objective = make_objective(trunk=built.trunk)
    job = fit_memory(job, lambda tokens: built.measure_memory(make_objective().step, tokens))
    built.set_levels(job.plan.levels)
    # The cuts of shared prefixes move from epoch to epoch: a cached trunk would never find them.
    shares = job.loader.share_prefixes and not built.wants_trunk
    loader = replace(job.loader, share_prefixes=shares)
    run = Run(
        recipe=job.resolved.recipe,
        model=built.model,
        parameters=built.parameters,
        objective=objective,
        optimizer=build_optimizer(built.parameters, recipe.train),
        loader=loader,
        validation=validation_batches(job, loader),
        checkpoints=Checkpoints(
            run_dir.checkpoints,
            recipe.checkpoint.keep,
            lambda folder: save_trained(built.model, folder),
            lambda folder: load_weights(built.model, folder),
        ),
        events=events,
        stop=stop,
        device=device,
        autocast_dtype=built.autocast_dtype,
        num_steps=job.num_steps,
        after_step=HeapTrimmer(job.device, job.predicted_bytes).after_step,
    )
    return run, job, built.notes


def finish(
    run: Run, run_dir: RunDirectory, job: Job, state: TrainState, memory: dict[str, int]
) -> dict[str, Json]:
    """Export: the best weights into `model/`, the plot, the summary."""
    if state.best_step is not None and state.best_step != state.step:
        run.checkpoints.load_best(
            state.best_step, lambda text: run.events.emit("warning", state.step, {"message": text})
        )
    summary: dict[str, Json] = {
        "train_loss": state.loss_sum / max(1, state.step),
        "eval_loss_before": state.first_loss,
        "eval_loss": state.best_loss,
        "best_step": state.best_step,
        "steps": state.step,
        "epochs": round(state.step / job.loader.steps_per_epoch, 3),
        "runtime_seconds": round(state.train_seconds, 2),
        "samples_per_second": round(state.samples_seen / max(state.train_seconds, 1e-9), 3),
        "tokens_per_second": round(state.tokens_seen / max(state.train_seconds, 1e-9), 1),
        "tokens": state.tokens_seen,
        "trained_parameters": sum(parameter.numel() for _, parameter in run.parameters),
        **memory,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    label, is_adapter = Path(run.recipe.output).name, isinstance(run.recipe.method, LoraConfig)
    card = result_card(label=label, base=job.source.label, is_adapter=is_adapter, facts={**summary})
    write_result(run.model, job.tokenizer, run_dir.model, card)
    plot_loss(list(read_events(run_dir.events)), run_dir.path / "loss.png", label)
    run_dir.save_summary(summary)
    return summary
