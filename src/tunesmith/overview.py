"""What a run will do, in words and values: for the start event and `tunesmith plan`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

from tunesmith.config.auto import AUTO_KEYS, OBJECTIVE_KEYS
from tunesmith.config.budget import SAFE_SHARE
from tunesmith.config.load import flatten
from tunesmith.config.recipe import Recipe
from tunesmith.job import Job
from tunesmith.model.device import Device
from tunesmith.types import Json


def overview(job: Job, asked: Recipe, more_notes: Sequence[str] = ()) -> dict[str, Json]:
    """What a run will do, for the start event and `tunesmith plan`."""
    split, store = job.split, job.split.train_store
    text = (
        f"{job.source.label}: {len(split.train):,} samples to train on, "
        f"{len(split.validation):,} to validate on, {int(store.lengths().sum()):,} tokens; "
        f"template: {job.template}"
    )
    notes = [f"{count:,} samples: {note}" for note, count in job.notes.items()]
    notes += [*_mixture(job), *job.findings, *more_notes]
    if asked.evaluate.early_stopping is not None and not len(split.validation):
        notes.append("evaluate.early_stopping has no effect: no rows are held out to validate on")
    most, counts = f"longer than {job.loader.max_length} tokens", split.counts
    of_validation = split.validation_counts
    end = "start" if job.loader.overlong == "cut_left" else "end"
    for count, what in (
        (counts.truncated, f"{most}, their {end} is cut off"),
        (counts.split, f"{most}, cut into pieces"),
        (counts.dropped, f"{most}, left out"),
        (counts.unsupervised, "without anything to learn, left out"),
        (counts.leaked, "of training that validation has, too, left out of training"),
        (counts.bad, "with problems, left out (data.bad_rows: drop)"),
        (of_validation.truncated, f"of validation {most}, their {end} is cut off"),
        (of_validation.dropped, f"of validation {most}, left out"),
        (of_validation.unsupervised, "of validation without anything to learn, left out"),
        (of_validation.bad, "of validation with problems, left out (data.bad_rows: drop)"),
    ):
        if count:
            notes.append(f"{count:,} samples {what}")
    if not job.plan.fits:
        notes.append(
            f"the predicted peak of memory, {job.plan.predicted_bytes / 2**30:.1f} GiB, is over "
            f"{SAFE_SHARE:.0%} of the {job.plan.memory_bytes / 2**30:.1f} GiB there are"
        )
    wanted, values = flatten(asked.model_dump()), flatten(job.resolved.recipe.model_dump())
    auto: dict[str, Json] = {
        k: values[k] for k in (*AUTO_KEYS, *OBJECTIVE_KEYS) if wanted.get(k) == "auto"
    }
    reasons: dict[str, Json] = {k: job.resolved.reasons.get(k, "as before") for k in auto}
    return {
        "num_steps": job.num_steps,
        "model": job.source.label,
        "overview": text,
        "notes": list(notes),
        "auto": auto,
        "reasons": reasons,
        "predicted_peak_bytes": job.predicted_bytes,
        "environment": environment_of(job.device),
    }


LIBRARIES = ("tunesmith", "torch", "transformers", "tokenizers", "peft")
"""What decides a run's numbers, besides Python."""


def environment_of(device: Device) -> dict[str, Json]:
    """The machine and the versions, for whoever wants to repeat a run."""
    memory = f"{device.memory_bytes / 2**30:.1f} GiB"
    versions: dict[str, Json] = {"python": platform.python_version()}
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "device": f"{device.name}, {memory}",
        "versions": versions | {name: version(name) for name in LIBRARIES},
    }


def _mixture(job: Job) -> list[str]:
    """What each of several sources gives to an epoch."""
    shares = job.split.shares
    if len(shares) < 2:
        return []
    total = sum(share.draws for share in shares)
    parts = [
        f"{label} {share.draws:,} of {share.size:,} ({100 * share.draws / total:.0f} %)"
        for label, share in zip(job.labels, shares, strict=True)
    ]
    return [f"an epoch has {total:,} samples, {job.loader.mix}: {', '.join(parts)}"]
