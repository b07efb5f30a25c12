"""The whole of a run on one page: config -> data -> model -> objective -> fit -> export.

Read this first; every name leads to the module that does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.config.load import LoadedRecipe
from tunesmith.engine.checkpoint import open_checkpoints
from tunesmith.engine.loop import fit, restore
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.engine.rng import seed_run
from tunesmith.engine.rundir import RunDirectory, open_run
from tunesmith.engine.session import Session, open_session
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.step import Run
from tunesmith.goal import make_objective
from tunesmith.io.atomic import sweep_temporaries
from tunesmith.io.fault import fault
from tunesmith.io.lock import directory_lock
from tunesmith.job import Job, fit_memory, prepare, validation_loader
from tunesmith.model.adapters import TrainedWeights
from tunesmith.model.build import build_model
from tunesmith.model.device import HeapTrimmer, PeakMemory, prepare_machine
from tunesmith.model.load import load_model
from tunesmith.objectives.base import own_parameters
from tunesmith.objectives.lm import SftObjective
from tunesmith.overview import overview
from tunesmith.reference_pass import with_reference
from tunesmith.results import answer_samples, finish, open_meter, with_report
from tunesmith.rollout.build import with_rollouts
from tunesmith.types import Json, Listener, Reporter, SilentReporter


def train(
    loaded: LoadedRecipe,
    *,
    restart: bool = False,
    allow_changes: bool = False,
    reporter: Reporter | None = None,
    listeners: Sequence[Listener] = (),
    stop: StopSignal | None = None,
    load: Callable[..., Any] = load_model,
) -> tuple[RunDirectory, dict[str, Json]]:
    """Runs a recipe to its end, or goes on with it; returns the run directory and its summary.

    Args:
        loaded: the recipe.
        restart: begin anew; an earlier run is kept aside.
        allow_changes: go on with a run whose recipe or data were others.
        reporter: shows long work.
        listeners: follow the event stream.
        stop: what can ask the run to save and stop, besides signals.
        load: gives the base model, see `build_model`.

    Raises:
        TunesmithError: see `errors.py`; `Interrupted` after a signal, with all saved.
    """
    reporter = reporter or SilentReporter()
    run_dir = open_run(loaded.recipe, restart=restart, allow_changes=allow_changes)
    with directory_lock(run_dir.path), stop or StopSignal(str(run_dir.path)) as stop:
        sweep_temporaries(run_dir.path)
        if run_dir.summary is not None:
            return run_dir, run_dir.summary
        job = prepare(loaded, reporter, run_dir.resolved(loaded.recipe))
        guard, log = loaded.recipe.guard, loaded.recipe.log
        opening = open_session(run_dir, stop, guard, listeners, log)
        with with_report(run_dir.path), opening as session:
            run, job, notes = build(job, session, reporter, load)
            run_dir.save_recipes(loaded.recipe, job.resolved.recipe, job.resolved.reasons)
            state = restore(run, job.fingerprints, run_dir.changes, allow_changes=allow_changes)
            session.events.emit("start", state.step, overview(job, loaded.recipe, notes))
            peak = PeakMemory(job.device)
            peak.begin_phase()
            with stop.deferred():
                if not state.step:
                    answer_samples(run, job, state)
                state = fit(run, state)
            session.watchdog.pause()
            summary = finish(run, job, state, peak.facts(job.predicted_bytes))
            run_dir.save_summary(summary)
            session.events.emit("done", state.step, summary)
    return run_dir, summary


def build(
    job: Job, session: Session, reporter: Reporter, load: Callable[..., Any] = load_model
) -> tuple[Run, Job, tuple[str, ...]]:
    """Model -> objective -> run: loads the weights and puts all parts together.

    Returns:
        the run, the job (with another plan if two small steps said so), and notes for the user.
    """
    recipe, device = job.resolved.recipe, job.device.torch_device
    prepare_machine(job.device)
    session.watchdog.beat("load", 0)
    fault("model.load")
    with reporter.waiting(f"Loading {job.source.label}"):
        built = build_model(
            job.source,
            recipe,
            device,
            num_tokens=job.num_tokens,
            seed=lambda: seed_run(recipe.train.seed),
            batch_of=None if session.run_dir.has_checkpoint else job.loader.batch,
            load=load,
        )
    objective, about = make_objective(job, built)
    job = fit_memory(job, lambda tokens: built.measure_memory(SftObjective().step, tokens))
    built.set_levels(job.plan.levels)
    # The cuts of shared prefixes move from epoch to epoch: a cached trunk would never find them.
    shares = job.loader.share_prefixes and not built.wants_trunk
    loader = replace(job.loader, share_prefixes=shares)
    parameters = [*built.parameters, *own_parameters(objective)]
    optimizer = build_optimizer(parameters, recipe.train, recipe.method)
    weights = TrainedWeights(built.model)
    checkpoints = open_checkpoints(
        session.run_dir.checkpoints, recipe.checkpoint, weights, optimizer
    )
    run = Run(
        recipe=job.resolved.recipe,
        model=built.model,
        parameters=parameters,
        objective=objective,
        optimizer=optimizer,
        loader=loader,
        validation=validation_loader(job, loader),
        checkpoints=checkpoints,
        events=session.events,
        stop=session.stop,
        watchdog=session.watchdog,
        device=device,
        autocast_dtype=built.autocast_dtype,
        num_steps=job.num_steps,
        peak_bytes=lambda tokens: job.facts.needs.peak_bytes(tokens, job.plan.levels),
        after_step=HeapTrimmer(job.device, job.predicted_bytes).after_step,
        losses=session.losses,
    )
    run = replace(run, meter=open_meter(run, job))
    run, known = with_reference(with_rollouts(run, job.judge), job, reporter)
    return run, job, (*built.notes, *about, *known)
