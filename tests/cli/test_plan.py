"""What `tunesmith plan` says about memory, and how small steps on the model change the plan."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli.plan import _memory, _recomputed
from tunesmith.config.budget import Needs, Wish, plan_memory
from tunesmith.config.load import load_recipe
from tunesmith.job import Job, fit_memory, prepare
from tunesmith.model.memory import StepBytes
from tunesmith.types import SilentReporter

OPEN = {"micro_batch_tokens": "auto"}
NO_DROPOUT = {"dropout": 0.0}


def job_of(recipe: Path) -> Job:
    return prepare(load_recipe(str(recipe), []), SilentReporter())


def refuse(tokens: int) -> StepBytes:
    raise AssertionError("no step is needed")


def with_memory(job: Job, memory_bytes: int, kind: str = "cpu") -> Job:
    device = dataclasses.replace(job.device, kind=kind, memory_bytes=memory_bytes)
    facts = dataclasses.replace(job.facts, memory_bytes=memory_bytes, device_kind=kind)
    return dataclasses.replace(job, device=device, facts=facts)


def test_with_plenty_of_memory_no_step_is_taken(tiny_recipe: Callable[..., Path]) -> None:
    job = with_memory(job_of(tiny_recipe(train=OPEN, method=NO_DROPOUT)), 1 << 40)
    assert fit_memory(job, refuse) is job
    assert job.plan.micro_batch_tokens == 2048
    needs = job.facts.needs
    assert needs.static_bytes < job.predicted_bytes <= job.plan.predicted_bytes


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_tight_memory_is_measured(tiny_recipe: Callable[..., Path], kind: str) -> None:
    job = job_of(tiny_recipe(train=OPEN, method=NO_DROPOUT))
    memory = int(1.5 * job.plan.predicted_bytes)
    free = int(0.9 * memory) - job.facts.needs.static_bytes
    most = {"cpu": 1000, "cuda": 5000}[kind]  # tokens that fit

    def measure(tokens: int) -> StepBytes:
        return StepBytes(kept=int(0.9 * free / most * tokens), peak=free // most * tokens)

    found = fit_memory(with_memory(job, memory, kind), measure)
    train = found.resolved.recipe.train
    # The head's memory besides lets a little less in.
    assert 0.75 * most <= train.micro_batch_tokens <= most
    assert train.checkpointing == "none"
    assert found.loader.micro_batch_tokens == train.micro_batch_tokens
    assert found.plan.fits
    assert "would fill 90%" in found.resolved.reasons["train.micro_batch_tokens"]
    assert found.num_steps == job.num_steps


def test_what_is_written_down_stays(tiny_recipe: Callable[..., Path]) -> None:
    path = tiny_recipe(train=OPEN, method=NO_DROPOUT)
    job = job_of(path)
    again = prepare(load_recipe(str(path), []), SilentReporter(), job.resolved.recipe)
    assert again.resolved.recipe == job.resolved.recipe
    assert again.resolved.reasons == {}
    assert again.plan.levels == job.plan.levels
    assert fit_memory(with_memory(again, 1 << 20), refuse).loader == again.loader


def test_memory_is_explained_by_its_parts(tiny_recipe: Callable[..., Path]) -> None:
    job = job_of(tiny_recipe(train=OPEN))
    text = _memory(job, 100)
    for part in ("weights", "optimizer", "activations", "head and backward", "libraries and data"):
        assert part in text
    assert text.startswith(f"{job.facts.needs.peak_bytes(100, job.plan.levels) / 2**30:.2f} GiB")


def test_recomputed_layers_are_counted() -> None:
    needs = Needs(0, 0, 0, {"none": 100.0, "mlp": 40.0, "full": 10.0}, num_layers=10)
    wish = Wish("cuda", 1 << 40, 100, checkpointing="full", checkpointed_layers=4)
    assert _recomputed(plan_memory(needs, wish)) == "full: 4, mlp: 6"
    assert _recomputed(plan_memory(needs, Wish("cuda", 1 << 40, 100))) == "none"
