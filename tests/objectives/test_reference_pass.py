"""`reference: cached`: the same numbers as with the model beside it, kept, continued, mended."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from objectives.test_preference import write_pairs
from objectives.test_rated import write_rated
from tunesmith import reference_pass
from tunesmith.config.objective import PreferenceConfig, RatedConfig
from tunesmith.data.loader import Loader
from tunesmith.engine.step import Run, evaluate_loss, update
from tunesmith.errors import OutOfMemoryError
from tunesmith.io.cache import cache_folder
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.lm import sequence_logp
from tunesmith.reference_pass import ReferencePass
from tunesmith.types import PackedBatch, SilentReporter


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe on pairs, or on rated answers."""

    def make(name: str = "dpo", **changes: Any) -> Path:
        is_rated = OBJECTIVES[name].group_size == 1
        write = write_rated if is_rated else write_pairs
        data = {"train": str(write(tmp_path)), "validation": 0.2}
        objective = {"name": name, "reference": "cached"}
        method = {"name": "lora", "rank": 4, "dropout": 0.0}
        plain: dict[str, Any] = {"method": method, "data": data, "objective": objective}
        return tiny_recipe(**{**plain, **changes})

    return make


def fresh_run(path: Path, *overrides: str) -> AbstractContextManager[Run]:
    """A run in a directory of its own: two starts within a second are too near for one."""
    return make_run(path, f"output={path.parent / uuid.uuid4().hex}", *overrides)


@pytest.mark.parametrize(
    ("name", "method"),
    [("dpo", "lora"), ("dpo", "full"), ("ipo", "freeze"), ("apo_zero_unpaired", "full")],
)
def test_losses_equal_those_with_the_model_beside(
    recipe: Callable[..., Path], name: str, method: str
) -> None:
    """A step and a validation after the weights have moved."""
    found: list[list[float]] = []
    for reference in ("cached", "true"):
        overrides = (f"objective.reference={reference}", f"method={method}")
        with fresh_run(recipe(name), *overrides) as run:
            objective: Any = run.objective
            assert (objective.reference is None) == (reference == "cached")
            torch.manual_seed(1)
            with torch.no_grad():
                for _, parameter in run.parameters:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            step = update(run, run.loader.batch(0), 0)
            assert step is not None
            assert run.validation is not None
            measured = evaluate_loss(run, run.validation.all_batches())
            found.append([*step.tolist(), *(measured or [])])
    assert len(found[0]) > 5
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


def test_the_first_loss_is_ln_2_within_rounding(recipe: Callable[..., Path]) -> None:
    with fresh_run(recipe()) as run:
        found = update(run, run.loader.batch(0), 0)
    assert found is not None
    assert found[0].item() == pytest.approx(math.log(2), abs=1e-5)


def count_passes(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[int]:
    """Counts the batches that passes run, and cuts a pass off after some."""
    counted = [0]

    def counting(model: Any, batch: PackedBatch, trunk: Any) -> torch.Tensor:
        if counted[0] == stop_after:
            raise KeyboardInterrupt
        counted[0] += 1
        return sequence_logp(model, batch, trunk)

    monkeypatch.setattr(reference_pass, "sequence_logp", counting)
    return counted


def kept_files() -> list[Path]:
    return sorted(cache_folder("references").rglob("*.npy"))


def test_a_second_start_takes_what_is_kept(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a full tuning after LoRA: both begin as the base. Other samples or starts do not."""
    counted = count_passes(monkeypatch)
    with fresh_run(recipe()) as run:
        first = run.loader.reference
    some = counted[0]
    assert some > 0
    assert len(kept_files()) == 2  # training and validation
    with fresh_run(recipe(), "method=full") as run:
        assert run.loader.reference is not None
        assert first is not None
        np.testing.assert_array_equal(first, run.loader.reference)
    assert counted[0] == some
    with fresh_run(recipe(), "data.validation=0.1"):
        assert counted[0] > some
    some = counted[0]
    with fresh_run(recipe(), "method={name: lora, init: orthogonal, rank: 4}"):
        assert counted[0] > some


@pytest.mark.slow
def test_a_pass_that_is_cut_off_goes_on(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_pass, "PART_SAMPLES", 2)
    path = recipe()
    whole = count_passes(monkeypatch)
    with fresh_run(path) as run:
        expected = run.loader.reference
    for file in kept_files():
        file.unlink()
    cut = count_passes(monkeypatch, stop_after=7)
    with pytest.raises(KeyboardInterrupt), fresh_run(path):
        pass
    parts = kept_files()
    assert len(parts) >= 2
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"x")  # a damaged part is made again
    again = count_passes(monkeypatch)
    with fresh_run(path) as run:
        assert expected is not None
        assert run.loader.reference is not None
        np.testing.assert_array_equal(expected, run.loader.reference)
    assert 0 < again[0] < whole[0]
    assert cut[0] == 7
    assert len(kept_files()) == 2
    assert not list(cache_folder("references").glob("*.parts"))


def test_a_damaged_file_is_made_again(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = recipe()
    with fresh_run(path) as run:
        expected = run.loader.reference
    for file in kept_files():
        file.write_bytes(file.read_bytes()[:-4] + b"1234")
    counted = count_passes(monkeypatch)
    short = recipe(train={"max_steps": 2})
    assert run_to_end(short, tmp_path / "run")["steps"] == 2
    assert counted[0] > 0
    assert "damaged and made again" in (tmp_path / "run" / "events.jsonl").read_text()
    with fresh_run(path) as run:
        assert expected is not None
        assert run.loader.reference is not None
        np.testing.assert_array_equal(expected, run.loader.reference)


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_same(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Also where the kept numbers are gone in between: the pass sees the model as it began."""
    path = recipe("dpo", method="full")
    run_to_end(path, tmp_path / "whole")
    run_and_stop(path, tmp_path / "parts", 7)
    for file in kept_files():
        file.unlink()
    run_to_end(path, tmp_path / "parts")
    assert final_bytes(tmp_path / "whole") == final_bytes(tmp_path / "parts")


def test_two_processes_do_not_wait_for_each_other(recipe: Callable[..., Path]) -> None:
    from tunesmith.io.lock import directory_lock

    with fresh_run(recipe()) as run:
        expected = run.loader.reference
    for file in kept_files():
        workplace = file.parent.with_name(f"{file.parent.name}.parts")
        workplace.mkdir()
        file.unlink()
    folders = list(cache_folder("references").glob("*.parts"))
    with directory_lock(folders[0]), directory_lock(folders[1]), fresh_run(recipe()) as run:
        assert expected is not None
        assert run.loader.reference is not None
        np.testing.assert_array_equal(expected, run.loader.reference)


def a_pass(loader: Loader, most_tokens: int, folder: Path) -> ReferencePass:
    """A pass whose measure has no memory for more tokens than that."""

    def measure(batch: PackedBatch) -> torch.Tensor:
        if batch.num_stored_tokens > most_tokens:
            raise MemoryError("no room")
        return batch.last_S.float()

    return ReferencePass(loader, {}, measure, folder)


@pytest.mark.slow
def test_less_at_once_where_memory_ends(recipe: Callable[..., Path], tmp_path: Path) -> None:
    with fresh_run(recipe(), "train.micro_batch_tokens=400") as run:
        loader = replace(run.loader, reference=None)
        values = a_pass(loader, 200, tmp_path / "a").values(SilentReporter(), print)
        chosen = [i for s in loader.samples for i in loader.store.sequences_of(int(s))]
        assert np.isfinite(values[chosen]).all()
        assert np.isnan(np.delete(values, chosen)).all()
        with pytest.raises(OutOfMemoryError, match=r"pairs\.jsonl"):
            less = replace(loader, micro_batch_tokens=16)
            a_pass(less, 3, tmp_path / "b").values(SilentReporter(), print)


def test_where_it_makes_no_sense_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="mismatched answers change from step to step"):
        RatedConfig.model_validate({"name": "kto", "reference": "cached"})
    with pytest.raises(ValidationError, match="simpo looks at none"):
        PreferenceConfig.model_validate({"name": "simpo", "reference": "cached"})
    with pytest.raises(ValidationError):
        PreferenceConfig.model_validate({"name": "dpo", "reference": "kept"})
