"""The whole of a run on one page: config -> data -> model -> objective -> fit -> export.

Read this first; every name leads to the module that does the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.config.auto import AUTO_KEYS, Facts, Resolved, resolve
from tunesmith.config.load import LoadedRecipe, flatten
from tunesmith.config.recipe import LoraConfig, Recipe, SourceConfig
from tunesmith.data.loader import Loader
from tunesmith.data.plan import Split, make_split
from tunesmith.data.store import StoreInputs, TokenStore, open_store
from tunesmith.data.templates import Renderer, install_template
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
from tunesmith.io.cache import cache_folder
from tunesmith.io.lock import directory_lock
from tunesmith.model.adapters import attach, load_weights, save_weights, trainable_parameters
from tunesmith.model.device import Device, find_device, peak_memory_bytes
from tunesmith.model.load import PACKED_ATTENTION, ModelSource, check_weights_exist, find_model
from tunesmith.model.load import load_config, load_model, load_tokenizer
from tunesmith.model.memory import Needs, Sizes, estimate_needs, measure_config
from tunesmith.objectives import OBJECTIVES
from tunesmith.types import Json, Listener, Reporter, SilentReporter, Tokenizer


@dataclass(frozen=True)
class Job:
    """Everything known about a run before its weights are loaded."""

    source: ModelSource
    tokenizer: Tokenizer
    template: str
    notes: dict[str, int]
    resolved: Resolved
    split: Split
    sizes: Sizes
    needs: Needs
    device: Device
    loader: Loader
    data_key: str
    num_steps: int


def prepare(loaded: LoadedRecipe, reporter: Reporter, resolved: Recipe | None = None) -> Job:
    """Config -> data: checks model and data, tokenizes, splits, and fills in every `auto`.

    Args:
        loaded: the recipe.
        reporter: shows long work.
        resolved: the values of an earlier start, to go on with exactly these.
    """
    recipe, data = loaded.recipe, loaded.recipe.data
    source = find_model(recipe.model, reporter, loaded.folder)
    check_weights_exist(source)
    tokenizer = load_tokenizer(source)
    template = install_template(tokenizer, data.template, loaded.folder)
    renderer = Renderer(tokenizer, dict(data.template_arguments))
    store = _open(data.train, renderer, loaded, reporter)
    held_out = data.validation if isinstance(data.validation, list) else []
    validation_store = _open(held_out, renderer, loaded, reporter) if held_out else None
    device, sizes = find_device(), measure_config(load_config(source))
    needs = estimate_needs(sizes, recipe, is_bf16=device.has_fast_bf16)
    facts = Facts(
        num_rows=store.num_samples,
        longest_tokens=int(store.longest_of_samples().max()),
        context_tokens=sizes.context_tokens,
        hidden_size=sizes.hidden_size,
        device_kind=device.kind,
        has_fast_bf16=device.has_fast_bf16,
        free_bytes=int(0.6 * device.memory_bytes) - needs.weight_bytes - needs.optimizer_bytes,
        activation_bytes_per_token=needs.activation_bytes_per_token,
    )
    values = Resolved(resolved, {}) if resolved is not None else resolve(recipe, facts)
    train, max_length = values.recipe.train, values.recipe.data.max_length
    if "auto" in (max_length, train.global_batch, train.micro_batch_tokens, train.epochs):
        raise ValueError("the recipe is not resolved")
    split = make_split(
        values.recipe.data, store, validation_store, max_length=int(max_length), seed=train.seed
    )
    batch, budget = int(train.global_batch), int(train.micro_batch_tokens)
    loader = Loader(store, split.train, batch, budget, int(max_length), train.seed)
    num_steps = loader.steps_per_epoch * int(train.epochs)
    if train.max_steps is not None:
        num_steps = min(num_steps, train.max_steps)
    notes = {**store.notes, **(validation_store.notes if validation_store else {})}
    key = store.key + (validation_store.key if validation_store else "")
    return Job(
        source, tokenizer, template, notes, values, split, sizes, needs, device, loader, key, num_steps
    )


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
        job = prepare(loaded, reporter, run_dir.resolved())
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
        seed_run(recipe.train.seed)
        model = attach(base, recipe.method).to(device)
    parameters = trainable_parameters(model)
    validation = Loader(
        job.split.validation_store,
        job.split.validation,
        job.loader.global_batch,
        job.loader.micro_batch_tokens,
        job.loader.max_length,
        job.loader.seed,
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
        load_weights(run.model, run_dir.checkpoints / f"step-{state.best_step:08d}")
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


def overview(job: Job, asked: Recipe) -> dict[str, Json]:
    """What a run will do, for the start event and `tunesmith plan`."""
    split, store = job.split, job.split.train_store
    text = (
        f"{job.source.label}: {len(split.train):,} samples to train on, "
        f"{len(split.validation):,} to validate on, {int(store.lengths().sum()):,} tokens; "
        f"template: {job.template}"
    )
    notes = [f"{count:,} samples: {note}" for note, count in job.notes.items()]
    for count, what in (
        (split.num_truncated, f"longer than {job.loader.max_length} tokens, their end is cut off"),
        (split.num_dropped, f"longer than {job.loader.max_length} tokens, left out"),
        (split.num_unsupervised, "without anything to learn, left out"),
    ):
        if count:
            notes.append(f"{count:,} samples {what}")
    wanted, values = flatten(asked.model_dump()), flatten(job.resolved.recipe.model_dump())
    auto: dict[str, Json] = {k: values[k] for k in AUTO_KEYS if wanted.get(k) == "auto"}
    reasons: dict[str, Json] = {k: job.resolved.reasons.get(k, "as before") for k in auto}
    return {
        "num_steps": job.num_steps,
        "model": job.source.label,
        "overview": text,
        "notes": list(notes),
        "auto": auto,
        "reasons": reasons,
    }


def _open(
    sources: list[SourceConfig], renderer: Renderer, loaded: LoadedRecipe, reporter: Reporter
) -> TokenStore:
    places = [(source, loaded.locate(source.path)) for source in sources]
    return open_store(StoreInputs(places, renderer, cache_folder("stores")), reporter)
