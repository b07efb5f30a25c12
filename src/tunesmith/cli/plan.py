"""`tunesmith plan`: what a run would do, without doing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tunesmith.cli.console import ConsoleReporter, format_seconds, quiet_libraries
from tunesmith.cli.train import auto_table
from tunesmith.config.budget import COMPILE_SECONDS, COMPILED_SPEEDUP, LEVELS, Plan
from tunesmith.config.load import load_recipe
from tunesmith.job import Job, prepare
from tunesmith.model.adapters import attach
from tunesmith.model.device import prepare_machine
from tunesmith.model.fast_path import fast_layers, make_fast
from tunesmith.model.load import load_config, random_model
from tunesmith.model.quantize import quantize_layers
from tunesmith.objectives.lm import SftObjective
from tunesmith.overview import overview
from tunesmith.types import GlobalBatch, PackedBatch


def run_plan(recipe: str, overrides: Sequence[str]) -> None:
    """Prints steps, tokens, resolved values, and estimates of time and memory."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    reporter = ConsoleReporter(console)
    job = prepare(loaded, reporter)
    facts = overview(job, loaded.recipe)
    console.print(str(facts["overview"]), highlight=False)
    notes = facts["notes"]
    for note in notes if isinstance(notes, list) else []:
        console.print(f"note: {note}", highlight=False)
    values, reasons = facts["auto"], facts["reasons"]
    if isinstance(values, dict) and isinstance(reasons, dict):
        console.print(auto_table(values, reasons))
    with reporter.waiting("Timing a few layers"):
        estimates = _estimates(job)
    console.print(estimates)


def _estimates(job: Job) -> Table:
    tokens = _count_tokens(job)
    seconds = tokens["computed"] * measure_seconds_per_token(job)
    recipe = job.resolved.recipe
    if recipe.train.compile != "off":
        seconds = seconds / COMPILED_SPEEDUP + COMPILE_SECONDS
    table = Table(title="Plan", show_header=False, title_justify="left")
    rows: dict[str, str] = {
        "steps": f"{job.num_steps:,} ({job.loader.steps_per_epoch:,} an epoch)",
        "samples": f"{len(job.split.train):,} to train on, {len(job.split.validation):,} to "
        "validate on",
        "tokens to train on": f"{tokens['all']:,}, all real (no padding), "
        f"{100 * tokens['supervised'] / max(tokens['all'], 1):.0f} % supervised",
        "trained parameters": f"{job.sizes.num_trained:,} of {job.sizes.num_parameters:,}",
        "method": f"{recipe.method.name}, {recipe.model.dtype}, on {job.device.name}",
        "micro-batches": f"at most {job.plan.micro_batch_tokens:,} tokens, "
        f"the largest has {tokens['largest']:,}",
        "recomputed layers": _recomputed(job.plan),
        "compiling": recipe.train.compile,
        "estimated time": f"{format_seconds(seconds)} of training, validation not counted",
        "estimated memory": _memory(job, tokens["largest"]),
        "run directory": recipe.output,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _recomputed(plan: Plan) -> str:
    """Which layers make what again in their backward."""
    if plan.level == "none":
        return "none"
    names = sorted(set(plan.levels), key=LEVELS.index, reverse=True)
    return ", ".join(f"{name}: {plan.levels.count(name)}" for name in names)


def _memory(job: Job, tokens: int) -> str:
    """The predicted peak, in all and by its parts."""
    needs, levels = job.facts.needs, job.plan.levels
    peak = needs.peak_bytes(tokens, levels)
    kept = tokens * needs.kept_per_token(levels)
    parts = {
        "weights": needs.weight_bytes,
        "optimizer": needs.optimizer_bytes,
        "activations": kept,
        "head and backward": peak - needs.static_bytes - kept,
        "libraries and data": needs.other_bytes,
    }
    text = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"{peak / 2**30:.2f} GiB at the peak: {text}"


def _count_tokens(job: Job) -> dict[str, int]:
    """Tokens of all steps, from one epoch's batches; the largest micro-batch.

    Computed tokens are fewer where prefixes are shared.
    """
    epoch = [job.loader.batch(step) for step in range(job.loader.steps_per_epoch)]
    whole, rest = divmod(job.num_steps, len(epoch))

    def of_all_steps(count: Callable[[GlobalBatch], int]) -> int:
        return sum(map(count, epoch)) * whole + sum(map(count, epoch[:rest]))

    return {
        "all": of_all_steps(lambda batch: batch.num_tokens),
        "computed": of_all_steps(lambda batch: batch.num_stored_tokens),
        "supervised": of_all_steps(lambda batch: batch.num_supervised),
        "largest": max(m.num_stored_tokens for b in epoch for m in b.micro_batches),
    }


def measure_seconds_per_token(job: Job) -> float:
    """Times a training step of this model's own layers, with random weights.

    Models of one and of five layers are timed on one real micro-batch; all others follow on the
    line through them. They take turns, and the fastest of each counts: timed one after the other, a
    cold start of the smaller one once made the estimate a fifth of the truth.
    """
    batch = max(job.loader.batch(0).micro_batches, key=lambda micro: micro.num_stored_tokens)
    prepare_machine(job.device)
    models = [_few_layers(job, count) for count in (1, 5)]
    rounds = [[_time_step(job, model, batch) for model in models] for _ in range(7)]
    one, five = (min(times) for times in zip(*rounds[1:], strict=True))
    per_layer = max(0.0, (five - one) / 4)
    return (one + per_layer * (job.sizes.num_layers - 1)) / batch.num_stored_tokens


def _few_layers(job: Job, num_layers: int) -> Any:
    """The model that training would run, with all its fast paths, but few layers."""
    recipe = job.resolved.recipe
    config = load_config(job.source)
    config.get_text_config().num_hidden_layers = num_layers
    base = random_model(config, is_bf16=recipe.model.dtype == "bfloat16")
    if recipe.model.quantize != "none":
        quantize_layers(base, base.dtype, recipe.model.quantize)
    model = attach(base, recipe.method).to(job.device.torch_device)
    make_fast(model)
    return model


def _time_step(job: Job, model: Any, batch: PackedBatch) -> float:
    recipe, device = job.resolved.recipe, job.device.torch_device
    needs_autocast = recipe.model.dtype == "bfloat16" and not fast_layers(model)
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=needs_autocast):
        loss = SftObjective().step(model, batch.to(device)).loss_sum
    loss.backward()
    float(loss.detach())  # waits for the device
    return time.perf_counter() - started
