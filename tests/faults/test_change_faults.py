"""Something changed between two starts: harmless, refused with a list, or allowed on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.runs import KILLED, Place, train_to_the_end

pytestmark = pytest.mark.slow


def stop_at(place: Place, step: int) -> None:
    assert place.train(fault=f"step.micro:step={step}:kill") == KILLED, place.printed[-2000:]


def test_row_07_another_micro_batch(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """Other micro-batches after a resume: the same samples in each step, losses within 1e-6."""
    changes = {"method": {"dropout": 0.0}}
    whole, changed = (make_place(tmp_path / name, **changes) for name in ("whole", "changed"))
    train_to_the_end(whole)
    stop_at(changed, 10)
    train_to_the_end(changed, "train.micro_batch_tokens=64")
    assert changed.losses == pytest.approx(whole.losses, abs=1e-6)
    tokens = [{e["step"]: e["tokens"] for e in p.events_of("step")} for p in (whole, changed)]
    assert tokens[0] == tokens[1]


def test_row_08_a_row_of_the_data_is_edited(place: Place) -> None:
    """One byte of the data differs: refused by the file's name; --allow-changes goes on."""
    stop_at(place, 10)
    data = place.recipe.parent / "data.jsonl"
    data.write_text(data.read_text().replace("answer 49", "answer 48"))
    assert place.train() == 2
    assert "run.data-changed" in place.printed
    assert "data.jsonl" in place.printed.split("run.data-changed")[1]
    assert "--allow-changes" in place.printed
    train_to_the_end(place, "--allow-changes")
    assert place.events_of("resume")[-1]["changed"] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.learning_rate=0.02", "train.learning_rate: 0.01 -> 0.02"),
        pytest.param("train.seed=1", "train.seed: 0 -> 1", marks=pytest.mark.whole),
        pytest.param("data.validation=0.1", "data.validation: 0.2 -> 0.1", marks=pytest.mark.whole),
        pytest.param("train.epochs=6", "train.epochs: 5 -> 6", marks=pytest.mark.whole),
    ],
)
def test_row_09_a_change_of_the_numbers(place: Place, change: str, said: str) -> None:
    """Another learning rate, seed, split: refused with old and new value; allowed on request."""
    stop_at(place, 10)
    assert place.train(change) == 2
    assert "run.recipe-changed" in place.printed
    assert said in place.printed
    train_to_the_end(place, change, "--allow-changes")
    assert place.events_of("resume")[-1]["step"] > 0
    # What was allowed once is the run's own from then on.
    assert place.train(change) == 0


def test_row_09_harmless_changes(place: Place, oracle: Place) -> None:
    """What changes no number may change: saves, logs, patience with hangs."""
    stop_at(place, 10)
    train_to_the_end(place, "checkpoint.keep=3", "log.every_steps=2", "guard.hang_warn_seconds=99")
    assert place.final_bytes() == oracle.final_bytes()


def test_row_13_other_weights_than_were_saved(place: Place) -> None:
    """The method was changed and allowed: its weights have other names; refused with them."""
    stop_at(place, 10)
    assert place.train("method=full", "--allow-changes") == 3
    assert "checkpoint.other-weights" in place.printed
    assert "lora" in place.printed.split("checkpoint.other-weights")[1]


@pytest.mark.parametrize("change", ["method.rank=1", "train.optimizer=adamw_8bit"])
def test_row_13_other_shapes_than_were_saved(place: Place, change: str) -> None:
    """The rank or the optimizer was changed and allowed: nothing is stretched; exit 3."""
    stop_at(place, 10)
    assert place.train(change, "--allow-changes") == 3, place.printed[-2000:]
    assert "checkpoint.other-weights" in place.printed


def test_the_base_model_has_changed(place: Place, tmp_path: Path) -> None:
    """Another base under the same name: refused by what has changed."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(json.loads(place.recipe.read_text())["model"]["id"], base)
    more = f"model.id={base}"
    assert place.train(more, fault="step.micro:step=6:kill") == KILLED
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert place.train(more) == 2
    assert "base model" in place.printed.split("run.data-changed")[1]
