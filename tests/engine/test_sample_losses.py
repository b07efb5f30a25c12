"""The loss of every sample, as a by-product of training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.runs import make_run, run_to_end
from tunesmith.engine.sample_losses import SampleLosses, distinct, read_sample_losses
from tunesmith.engine.step import update


def expected_losses(run: object, step: int) -> dict[int, float]:
    """Each sample alone, by the objective itself."""
    found: dict[int, float] = {}
    for sample in distinct(run.loader.batch(step).sample_ids):  # type: ignore[attr-defined]
        total = weight = 0.0
        for batch in run.loader.batch(step).micro_batches:  # type: ignore[attr-defined]
            run.model.train()  # type: ignore[attr-defined]
            loss_N = run.objective.step(run.model, batch).loss_N  # type: ignore[attr-defined]
            mine = batch.sample_N == sample
            total += float((loss_N * batch.weight_N)[mine].sum())
            weight += float(batch.weight_N[mine].sum())
        found[sample] = total / weight
    return found


@pytest.mark.parametrize("budget", [24, 100000])
def test_a_step_tells_what_each_sample_lost(tiny_recipe: Callable[..., Path], budget: int) -> None:
    recipe = tiny_recipe(method={"dropout": 0.0})
    with make_run(recipe, f"train.micro_batch_tokens={budget}") as run:
        expected = expected_losses(run, 0)
        found = update(run, run.loader.batch(0), 0)
    assert found is not None
    assert found[3:].tolist() == pytest.approx(list(expected.values()), abs=1e-5)


def test_the_file_of_a_run_has_every_sample_once_an_epoch(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run_to_end(tiny_recipe(), tmp_path / "run")
    found = read_sample_losses(tmp_path / "run" / "samples")
    assert len(found) == 32
    assert all(sorted(of_epoch) == [0, 1, 2, 3, 4] for of_epoch in found.values())
    first, last = (sum(of_epoch[epoch] for of_epoch in found.values()) for epoch in (0, 4))
    assert last < first
    rows = json.loads((tmp_path / "run/samples/losses.json").read_text(encoding="utf-8"))["rows"]
    assert [row["epochs"][-1] for row in rows] == sorted(
        (of_epoch[4] for of_epoch in found.values()), reverse=True
    )
    assert rows[0]["origin"].startswith(str(tmp_path))
    assert rows[0]["label"]


def test_of_a_step_that_ran_twice_the_last_one_counts(tmp_path: Path) -> None:
    losses = SampleLosses(tmp_path)
    assert losses.record(1, 0, (5, 3, 3), [1.0, 2.0]) is None
    assert losses.record(1, 0, (5, 3), [4.0, float("nan")]) is None
    losses.close()
    with (tmp_path / "losses.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "samp')
    again = SampleLosses(tmp_path)
    again.record(2, 1, (3,), [0.5])
    again.close()
    assert read_sample_losses(tmp_path) == {3: {0: 4.0, 1: 0.5}, 5: {0: 2.0}}


def test_what_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    losses = SampleLosses(tmp_path / "samples")
    message = losses.record(1, 0, (1,), [1.0])
    assert message is not None
    assert "not written down" in message
    assert losses.record(2, 0, (1,), [1.0]) is None


def test_objectives_without_rows_of_their_own_write_nothing(tmp_path: Path) -> None:
    losses = SampleLosses(tmp_path / "samples")
    assert losses.record(1, 0, (1, 2), []) is None
    losses.close()
    assert not (tmp_path / "samples").exists()
