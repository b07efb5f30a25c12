"""The meter of forgetting, and what a run shows of it."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import fine_tune, load_recipe
from tunesmith.errors import DataError
from tunesmith.evaluate.forgetting import SHIPPED, ForgettingMeter
from tunesmith.infer.likelihood import GivenAnswer
from tunesmith.types import Event


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


ANSWERS = [GivenAnswer((1, 2, 3, 4, 5), 2), GivenAnswer((9, 8, 7), 1)]


def open_meter(model: Any, folder: Path) -> ForgettingMeter:
    return ForgettingMeter(model, ANSWERS, folder / "f.safetensors", nullcontext, lambda: False)


def test_nothing_is_forgotten_before_anything_is_learned(model: Any, tmp_path: Path) -> None:
    meter = open_meter(model, tmp_path)
    first = meter.measure(0)
    assert first is not None
    again = meter.measure(1)
    assert again == first
    assert first["general_kl"] == 0.0
    assert meter.warning(first) is None


def test_what_changes_shows_and_is_warned_of_once(model: Any, tmp_path: Path) -> None:
    meter = open_meter(model, tmp_path)
    meter.measure(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    resumed = open_meter(model, tmp_path)  # another process goes on
    found = resumed.measure(7)
    assert found is not None
    assert found["general_kl"] > 0.1
    warning = resumed.warning(found)
    assert warning is not None
    assert "the model forgets" in warning
    assert resumed.warning(found) is None


def test_without_its_beginning_only_the_loss_is_known(model: Any, tmp_path: Path) -> None:
    found = open_meter(model, tmp_path).measure(5)
    assert found is not None
    assert set(found) == {"general_loss"}


def test_a_stop_ends_it(model: Any, tmp_path: Path) -> None:
    meter = ForgettingMeter(model, ANSWERS, tmp_path / "f", nullcontext, lambda: True)
    assert meter.measure(0) is None


def test_a_lack_of_memory_turns_it_off(model: Any, tmp_path: Path) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError

    meter = open_meter(model, tmp_path)
    meter.autocast = no_memory
    assert meter.measure(0) == {}
    message = meter.warning({})
    assert message is not None
    assert "no memory" in message
    assert meter.warning({}) is None
    assert meter.measure(1) == {}


def test_a_run_measures_it_and_answers_rows(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        evaluate={"samples": 2, "general": "general.jsonl", "every": 10}, train={"epochs": 5}
    )
    rows = SHIPPED.read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "general.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    seen: list[Event] = []
    run, _ = fine_tune(load_recipe(recipe), listeners=[seen.append])
    found = [event.data for event in seen if event.kind == "evaluation"]
    assert [data["general_kl"] == 0.0 for data in found] == [True, False, False]
    assert all(float(str(data["general_loss"])) > 0 for data in found)
    assert (run.path / "forgetting.safetensors").exists()
    lines = (run.path / "samples/answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert [row["step"] for row in answers] == [0, 0, 20, 20]
    assert answers[0]["prompt"] == answers[2]["prompt"]
    assert answers[0]["label"]


def test_without_held_out_rows_it_is_measured_all_the_same(
    tiny_recipe: Callable[..., Path],
) -> None:
    recipe = tiny_recipe(
        data={"validation": 0}, evaluate={"general": "auto", "every": None}, train={"epochs": 1}
    )
    seen: list[Event] = []
    fine_tune(load_recipe(recipe), listeners=[seen.append])
    found = [event for event in seen if event.kind == "evaluation"]
    assert [event.step for event in found] == [0, 5]
    assert all("loss" not in event.data for event in found)


def test_general_data_of_long_rows_alone_is_refused(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "general.jsonl").write_text(
        json.dumps({"text": "x" * 1100}) + "\n", encoding="utf-8"
    )
    recipe = tiny_recipe(evaluate={"general": "general.jsonl"})
    with pytest.raises(DataError) as caught:
        fine_tune(load_recipe(recipe))
    assert caught.value.code == "data.no-general"
