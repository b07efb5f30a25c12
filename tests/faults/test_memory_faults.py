"""Out of memory: the same samples in smaller micro-batches, or the sample that is too large."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import make_run
from faults.runs import KILLED, Place
from tunesmith.engine.loop import fit
from tunesmith.engine.oom import TooLargeError, smaller_budget
from tunesmith.engine.state import TrainState
from tunesmith.engine.step import update
from tunesmith.errors import OutOfMemoryError
from tunesmith.io.fault import arm
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import GlobalBatch

slow = pytest.mark.slow

ONE_PACK = {
    "method": {"dropout": 0.0},
    "train": {"micro_batch_tokens": 100_000},
    "evaluate": {"every": None},
}


@slow
def test_row_40_memory_runs_out(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """More than 200 tokens at once do not fit: micro-batches are halved, losses agree to 1e-6."""
    large = make_place(tmp_path / "large", **ONE_PACK)
    assert large.train() == 0
    small = make_place(tmp_path / "small", **ONE_PACK)
    assert small.train(fault="step.backward:tokens>200:oom") == 0, small.printed[-3000:]
    assert "out of memory at" in small.events_of("warning")[0]["message"]
    assert small.losses == pytest.approx(large.losses, abs=1e-6)
    first, second = ([e["tokens"] for e in p.events_of("step")] for p in (large, small))
    assert first == second  # the same samples in each step


@slow
def test_row_40_the_smaller_budget_survives_a_kill(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """Killed after memory ran out: the restart keeps the smaller micro-batches, bits equal."""
    fault = "step.micro:tokens>200:oom"
    whole = make_place(tmp_path / "whole", **ONE_PACK)
    assert whole.train(fault=fault) == 0
    killed = make_place(tmp_path / "killed", **ONE_PACK)
    assert killed.train(fault=f"{fault},step.update:step=10:kill") == KILLED
    assert killed.train() == 0  # this time there is memory
    assert not [e for e in killed.events_of("warning") if e["step"] > 10]
    assert killed.final_bytes() == whole.final_bytes()


@slow
def test_row_40_one_sample_is_too_large(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """Not even one sample fits: exit 5 with its file:line and the memory needed."""
    place = make_place(tmp_path, **ONE_PACK)
    assert place.train(fault="step.micro:*:oom") == 5
    said = place.printed.split("memory.one-sample")
    assert len(said) == 2, place.printed[-3000:]
    assert "data.jsonl:" in said[0]
    assert "GiB" in said[1]


@slow
def test_row_40_memory_runs_out_in_evaluation(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """A validation batch does not fit: it is measured in smaller ones, with the same loss."""
    changes: dict[str, Any] = {**ONE_PACK, "evaluate": {"every": "epoch"}}
    large = make_place(tmp_path / "large", **changes)
    assert large.train() == 0
    small = make_place(tmp_path / "small", **changes)
    assert small.train(fault="eval.batch:tokens>200:oom") == 0, small.printed[-3000:]
    found = [[e["loss"] for e in p.events_of("evaluation")] for p in (large, small)]
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@slow
def test_row_40_one_validation_sample_is_too_large(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """A single row to validate on does not fit: exit 5 with the place in the validation file."""
    place = make_place(tmp_path, **{**ONE_PACK, "evaluate": {"every": "epoch"}})
    long = {"role": "assistant", "content": "long " * 80}
    row = {"messages": [{"role": "user", "content": "q"}, long]}
    (tmp_path / "held-out.jsonl").write_text(json.dumps(row) + "\n")
    more = f"data.validation={tmp_path / 'held-out.jsonl'}"
    assert place.train(more, fault="eval.batch:tokens>250:oom") == 5, place.printed[-3000:]
    assert "held-out.jsonl:1: memory.one-sample" in place.printed.replace("\n", "")


@slow
@pytest.mark.whole  # how much a library maps is not ours to say: not for every machine of a CI
def test_row_40_a_real_limit_of_the_system(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """The address space is limited (RLIMIT_AS) so that one pack of all rows does not fit."""
    rows = 3000
    changes = {**ONE_PACK, "train": {"micro_batch_tokens": 10_000_000, "max_steps": 2}}
    changes["train"] |= {"global_batch": 3000, "epochs": 5}
    changes["data"] = {"validation": 0}
    large = make_place(tmp_path / "large", rows=rows, **changes)
    assert large.train() == 0, large.printed[-3000:]
    peak = json.loads((large.output / "summary.json").read_text())
    small = make_place(tmp_path / "small", rows=rows, **changes)
    # Mapped files and libraries count, too: what a start needs, and a part of the step's own.
    started = resource_of_a_start(make_place, tmp_path / "start", rows, changes)
    own = peak["peak_of_steps_bytes"] - started["peak_of_steps_bytes"]
    limit = started["address_space"] + own // 4
    code = small.train(TEST_MEMORY_LIMIT=str(limit))
    assert code == 0, small.printed[-3000:]
    assert any("out of memory" in e["message"] for e in small.events_of("warning"))
    assert small.losses == pytest.approx(large.losses, abs=1e-5)


def resource_of_a_start(
    make_place: Callable[..., Place], folder: Path, rows: int, changes: dict[str, Any]
) -> dict[str, int]:
    """Memory of the same run with tiny micro-batches."""
    changes = {**changes, "train": {**changes["train"], "micro_batch_tokens": 256, "max_steps": 1}}
    place = make_place(folder, rows=rows, **changes)
    assert place.train(TEST_SAY_ADDRESS_SPACE="1") == 0
    summary = json.loads((place.output / "summary.json").read_text())
    (line,) = [row for row in place.printed.splitlines() if row.startswith("VmPeak")]
    return {**summary, "address_space": int(line.split()[1]) * 1024}


# In this process


@pytest.fixture
def planted() -> Any:
    """Arms faults, and disarms them at the end."""
    yield lambda text: arm({"TUNESMITH_FAULT": text})
    arm({})


def test_what_counts_as_out_of_memory() -> None:
    """Python's, CUDA's and the CPU allocator's errors do, others do not."""
    cpu = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError(cpu))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


def test_a_failed_step_leaves_nothing(
    tiny_recipe: Callable[..., Path], planted: Callable[[str], None]
) -> None:
    """Gradients of the micro-batches before are dropped with the step, the numbers are redrawn."""
    with make_run(tiny_recipe()) as run:
        batch = run.loader.batch(0)
        assert len(batch.micro_batches) > 1
        expected = update(run, batch, 0, highest_loss=-1.0)  # measured, not learned from
        planted("step.backward:2:oom")
        with pytest.raises(TooLargeError):
            update(run, batch, 0, highest_loss=-1.0)
        planted("")
        again = update(run, batch, 0, highest_loss=-1.0)
    assert expected is not None
    assert again is not None
    assert torch.equal(expected, again)


def test_budgets_get_smaller_until_sequences_are_alone(tiny_recipe: Callable[..., Path]) -> None:
    """Half, again half, ...; None when the largest sequence is what failed."""
    with make_run(tiny_recipe(**ONE_PACK)) as run:
        loader = run.loader
        (whole,) = loader.batch(0).micro_batches
        tokens = whole.num_stored_tokens
        budgets = []

        def packed(budget: int) -> GlobalBatch:
            return replace(loader, micro_batch_tokens=budget).batch(0)

        while (budget := smaller_budget(packed, tokens)) is not None:
            budgets.append(budget)
            loader = replace(loader, micro_batch_tokens=budget)
            tokens = max(b.num_stored_tokens for b in loader.batch(0).micro_batches)
        assert budgets == sorted(budgets, reverse=True)
        assert len(loader.batch(0).micro_batches) == 8


def test_one_sample_too_large_is_named(
    tiny_recipe: Callable[..., Path], planted: Callable[[str], None]
) -> None:
    """The error has the sample's place and the memory; no weight has changed."""
    with make_run(tiny_recipe(**ONE_PACK)) as run:
        before = [parameter.detach().clone() for _, parameter in run.parameters]
        planted("step.micro:*:oom")
        with pytest.raises(OutOfMemoryError, match=r"data\.jsonl:\d+: memory\.one-sample") as error:
            fit(run, TrainState({}))
        assert error.value.exit_code == 5
        for (_, after), old in zip(run.parameters, before, strict=True):
            assert torch.equal(after, old)
