"""tunesmith's side of the training benchmark: a run as `tunesmith train` makes it.

It goes first, because it decides which rows make up each global batch and how the adapter begins,
and writes both down for the peers. Only what could differ between the sides is set in the recipe;
all else is what `tunesmith train` does by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.train_work import (
    IGNORED_LABEL,
    Measured,
    Row,
    Shared,
    StepClock,
    Work,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from tunesmith.config.load import LoadedRecipe
    from tunesmith.data.loader import Loader
    from tunesmith.engine.loop import Run
    from tunesmith.job import Job
    from tunesmith.types import Event, Json, Tokenizer

PACKAGES = ("torch", "transformers", "peft")


def measure(folder: Path) -> Measured:
    """Prepares, writes down the shared rows, and trains."""
    import torch

    from tunesmith.job import prepare
    from tunesmith.types import SilentReporter

    work = Work(**read_json(folder / "work.json"))
    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "run", ignore_errors=True)  # of an earlier round
    job = prepare(recipe_of(work, folder), SilentReporter())
    clock = StepClock(work.steps)
    loss_again = train(job, work, folder, clock)
    recipe = job.resolved.recipe
    label = f"{recipe.model.dtype}, micro-batches of {recipe.train.micro_batch_tokens} tokens"
    return clock.measured(label, PACKAGES, loss_again)


class Enough(Exception):
    """Ends a run when all its steps are measured, before it saves."""


def train(
    job: Job,
    work: Work,
    folder: Path,
    clock: StepClock,
    afterwards: Callable[[Run], None] = lambda run: None,
) -> float:
    """The run from its first step to its last, by the parts of `tunesmith.train.train`.

    A step's time is what passes between two step events, so making its batch, and whatever else
    the loop does, is counted.

    Returns:
        The loss of the first global batch after all steps.
    """
    from tunesmith.engine.loop import fit
    from tunesmith.engine.rundir import RunDirectory
    from tunesmith.engine.session import open_session
    from tunesmith.engine.signals import StopSignal
    from tunesmith.engine.state import TrainState
    from tunesmith.engine.step import evaluate_loss
    from tunesmith.train import build
    from tunesmith.types import SilentReporter

    def listen(event: Event) -> None:
        if event.kind == "step":
            clock.stop(wait=False)
            clock.note(number(event.data["loss"]), number(event.data["grad_norm"]))
            if clock.is_done:
                raise Enough
            clock.start()

    run_dir = RunDirectory(folder / "run")
    run_dir.path.mkdir(parents=True, exist_ok=True)
    guard = job.resolved.recipe.guard
    with StopSignal() as stop, open_session(run_dir, stop, guard, [listen]) as session:
        run, job, _ = build(job, session, SilentReporter())
        share(folder, work, job, run)
        clock.start()
        with suppress(Enough):
            fit(run, TrainState(job.fingerprints))
        loss = evaluate_loss(run, run.loader.batch(0).micro_batches)
        afterwards(run)
    if loss is None:
        raise RuntimeError("stopped by a signal")
    return loss[0]


def number(value: object) -> float:
    """A number of an event."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def recipe_of(work: Work, folder: Path) -> LoadedRecipe:
    """The recipe; the schedule is constant because the peers' warm-up starts at 0, ours at 1/n."""
    from tunesmith.config.load import LoadedRecipe, recipe_from

    lora: dict[str, Json] = {"name": "lora", "rank": work.rank, "alpha": 2 * work.rank}
    recipe = recipe_from(
        {
            "model": work.model,
            "data": {"train": [work.data], "validation": 0, "max_length": work.max_length},
            "method": lora if work.method == "lora" else work.method,
            "train": {
                # Enough epochs for any number of rows; max_steps ends the run.
                "epochs": work.steps,
                "max_steps": work.steps,
                "global_batch": work.global_batch,
                "learning_rate": work.learning_rate,
                "schedule": "constant",
                "warmup": 0,
                "seed": work.seed,
            },
            # The peers do not save between steps either.
            "checkpoint": {"every_steps": work.steps + 1},
            "output": str(folder / "run"),
        }
    )
    return LoadedRecipe(recipe, "train_cpu", folder)


def share(folder: Path, work: Work, job: Job, run: Run) -> None:
    """Writes down rows, numbers and the untrained adapter for the peers."""
    from tunesmith.model.adapters import save_weights

    recipe, adapter = job.resolved.recipe, None
    if recipe.method.name == "lora":
        adapter = folder / "adapter"
        save_weights(run.model, adapter)
    lora = recipe.method.model_dump() if recipe.method.name == "lora" else None
    shared = Shared(
        model_path=job.source.path,
        dtype=recipe.model.dtype,
        lora=lora and {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": "all"},
        adapter=None if adapter is None else str(adapter),
        clip_norm=recipe.train.clip_norm or 0.0,
        batches=[rows_of_step(run.loader, job.tokenizer, step) for step in range(work.steps)],
    )
    write_json(folder / "shared.json", asdict(shared))


def rows_of_step(loader: Loader, tokenizer: Tokenizer, step: int) -> list[Row]:
    """The rows of one global batch, longest first: the least padding where a peer splits it."""
    rows: list[Row] = []
    for sample in loader.batch(step).sample_ids:
        for index in loader.store.sequences_of(sample):
            length = min(loader.store.length(index), loader.max_length)
            sequence = loader.store.sequence(index, (0, length))
            rows.append(row_of([int(token) for token in sequence.ids], sequence.runs, tokenizer))
    if len(rows) != loader.global_batch:
        raise ValueError(
            f"step {step} has {len(rows)} rows instead of {loader.global_batch}: "
            "the data has too few rows, or rows that become several sequences"
        )
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def row_of(ids: list[int], runs: Any, tokenizer: Any) -> Row:
    """A sequence as the peers take it; the text is split where the answer begins."""
    labels = [IGNORED_LABEL] * len(ids)
    for first, count, weight in runs:
        if weight != 1.0:
            raise ValueError(f"labels cannot express a weight of {weight}")
        labels[first : first + count] = ids[first : first + count]
    start = runs[0][0]
    parts = (ids[:start], ids[start:])
    prompt, response = (tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in parts)
    return {"input_ids": ids, "labels": labels, "prompt": prompt, "response": response}
