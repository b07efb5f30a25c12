"""The whole of a run on one page: config -> data -> model -> objective -> fit -> export.

Read this first; every name leads to the module that does the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.config.load import LoadedRecipe
from tunesmith.config.recipe import LoraConfig
from tunesmith.data.loader import Loader
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
from tunesmith.job import Job, overview, prepare
from tunesmith.model.adapters import attach, load_weights, save_weights, trainable_parameters
from tunesmith.model.device import peak_memory_bytes
from tunesmith.model.load import PACKED_ATTENTION, load_model
from tunesmith.model.packing import check_packing
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
        run_dir.save_recipes(loaded.recipe, job.resolved.recipe, job.resolved.reasons)
        with EventLog(run_dir.events, listeners) as events, StopSignal() as stop:
            run = build(job, run_dir, events, stop, reporter)
            state = restore(run, job.data_key)
            events.emit("start", state.step, overview(job, loaded.recipe))
            state = fit(run, state)
            summary = finish(run, run_dir, job, state)
            events.emit("done", state.step, summary)
    return run_dir, summary


def build(
    job: Job, run_dir: RunDirectory, events: EventLog, stop: StopSignal, reporter: Reporter
) -> Run:
    """Model -> objective -> run: loads the weights and puts all parts together."""
    recipe, device = job.resolved.recipe, job.device.torch_device
    is_bf16 = recipe.model.dtype == "bfloat16"
    is_lora = isinstance(recipe.method, LoraConfig)
    # Full tuning keeps fp32 weights: bfloat16 would round small updates away.
    dtype = "bfloat16" if is_bf16 and is_lora else "float32"
    with reporter.waiting(f"Loading {job.source.label}"):
        base = load_model(job.source, dtype=dtype, attention=PACKED_ATTENTION)
        check_packing(base, job.source.label)
        seed_run(recipe.train.seed)
        model = attach(base, recipe.method, job.source.revision).to(device)
    parameters = trainable_parameters(model)
    validation = Loader(
        job.split.validation_store,
        job.split.validation,
        job.loader.global_batch,
        job.loader.micro_batch_tokens,
        job.loader.max_length,
        job.loader.seed,
        overlong=job.loader.overlong,
    )
    return Run(
        recipe=recipe,
        model=model,
        parameters=parameters,
        objective=OBJECTIVES[recipe.objective.name](),
        optimizer=build_optimizer(parameters, recipe.train),
        loader=job.loader,
        validation=validation.all_batches if len(job.split.validation) else None,
        checkpoints=Checkpoints(
            run_dir.checkpoints,
            recipe.checkpoint.keep,
            lambda folder: save_weights(model, folder),
            lambda folder: load_weights(model, folder),
        ),
        events=events,
        stop=stop,
        device=device,
        autocast_dtype=torch.bfloat16 if is_bf16 else None,
        num_steps=job.num_steps,
    )


def finish(run: Run, run_dir: RunDirectory, job: Job, state: TrainState) -> dict[str, Json]:
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
        "peak_memory_bytes": peak_memory_bytes(job.device),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    label, is_adapter = Path(run.recipe.output).name, isinstance(run.recipe.method, LoraConfig)
    card = result_card(label=label, base=job.source.label, is_adapter=is_adapter, facts={**summary})
    write_result(run.model, job.tokenizer, run_dir.model, card)
    plot_loss(list(read_events(run_dir.events)), run_dir.path / "loss.png", label)
    run_dir.save_summary(summary)
    return summary
