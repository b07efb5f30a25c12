"""`tunesmith plan`: what a run would do, without doing it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from tunesmith.cli.console import ConsoleReporter, format_seconds, quiet_libraries
from tunesmith.cli.train import auto_table
from tunesmith.config.load import load_recipe
from tunesmith.train import Job, overview, prepare

EFFICIENCY = 0.45
"""Share of the plain matrix-product rate that a training step reaches: 0.3 to 0.6 measured."""


def run_plan(recipe: str, overrides: Sequence[str]) -> None:
    """Prints steps, tokens, resolved values, and estimates of time and memory."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    quiet_libraries()
    job = prepare(loaded, ConsoleReporter(console))
    facts = overview(job, loaded.recipe)
    console.print(str(facts["overview"]), highlight=False)
    notes = facts["notes"]
    for note in notes if isinstance(notes, list) else []:
        console.print(f"note: {note}", highlight=False)
    values, reasons = facts["auto"], facts["reasons"]
    if isinstance(values, dict) and isinstance(reasons, dict):
        console.print(auto_table(values, reasons))
    console.print(_estimates(job))


def _estimates(job: Job) -> Table:
    tokens = _count_tokens(job)
    seconds = tokens["all"] * job.needs.flops_per_token / (EFFICIENCY * measure_rate(job))
    recipe = job.resolved.recipe
    activations = job.needs.activation_bytes_per_token * tokens["largest"]
    memory = job.needs.weight_bytes + job.needs.optimizer_bytes + activations + 2**29
    table = Table(title="Plan", show_header=False, title_justify="left")
    rows: dict[str, str] = {
        "steps": f"{job.num_steps:,} ({job.loader.steps_per_epoch:,} an epoch)",
        "samples": f"{len(job.split.train):,} to train on, {len(job.split.validation):,} to "
        "validate on",
        "tokens to train on": f"{tokens['all']:,}, all real (no padding), "
        f"{100 * tokens['supervised'] / max(tokens['all'], 1):.0f} % supervised",
        "trained parameters": f"{job.needs.trained_parameters:,} of {job.sizes.num_parameters:,}",
        "method": f"{recipe.method.name}, {recipe.model.dtype}, on {job.device.name}",
        "estimated time": f"{format_seconds(seconds)} of training (by a factor of two)",
        "estimated memory": f"{memory / 2**30:.1f} GiB at the peak",
        "run directory": recipe.output,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _count_tokens(job: Job) -> dict[str, int]:
    """Tokens of all steps, from one epoch's batches; the largest micro-batch."""
    epoch = [job.loader.batch(step) for step in range(job.loader.steps_per_epoch)]
    whole, rest = divmod(job.num_steps, len(epoch))
    return {
        "all": sum(b.num_tokens for b in epoch) * whole + sum(b.num_tokens for b in epoch[:rest]),
        "supervised": sum(b.num_supervised for b in epoch) * whole
        + sum(b.num_supervised for b in epoch[:rest]),
        "largest": max(m.num_tokens for b in epoch for m in b.micro_batches),
    }


def measure_rate(job: Job, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a plain matrix product in the run's number format."""
    dtype = torch.bfloat16 if job.resolved.recipe.model.dtype == "bfloat16" else torch.float32
    rows, inner, columns = 512, job.sizes.hidden_size, job.sizes.intermediate_size
    a = torch.randn(rows, inner, device=job.device.torch_device).to(dtype)
    b = torch.randn(inner, columns, device=job.device.torch_device).to(dtype)
    a @ b
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        float((a @ b)[0, 0])  # waits for the device
        count += 1
    return 2.0 * rows * inner * columns * count / spent


