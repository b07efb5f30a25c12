"""`tunesmith evaluate` on a tiny model, as a user calls it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith import fine_tune, load_recipe
from tunesmith.cli.evaluate import EvaluateOptions, run_evaluate
from tunesmith.errors import EvaluationError, RunError

FEW = EvaluateOptions(max_new_tokens=8)


@pytest.fixture
def trained(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    recipe = tiny_recipe(train={"epochs": 1})
    fine_tune(load_recipe(recipe, [f"output={tmp_path / 'run'}"]))
    return tmp_path / "run"


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def test_a_run_beside_its_base_on_what_it_held_out(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_evaluate(str(trained), [], FEW)
    found = content(trained / "evaluation" / "validation")
    assert [model["role"] for model in found["models"]] == ["before", "after"]
    before, after = (model["scores"] for model in found["models"])
    assert after["loss"]["value"] < before["loss"]["value"]
    events = (trained / "events.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [json.loads(line) for line in events if '"evaluation"' in line]
    # The same rows, template and loss as the training's own validation.
    assert before["loss"]["value"] == pytest.approx(measured[0]["loss"], abs=2e-3)
    assert after["loss"]["value"] == pytest.approx(measured[-1]["loss"], abs=2e-3)
    assert found["effect"]["kl_nats"] > 0
    assert found["data"]["rows"] == 8
    by_metric = {each["metric"]: each for each in found["comparisons"]}
    assert by_metric["loss"]["verdict"] == "better"
    lines = (trained / "evaluation/validation/rows.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 8
    assert {"id", "path", "line", "prompt", "messages", "label", "before", "after"} <= set(first)
    assert first["after"]["loss"] > 0
    shown = capsys.readouterr().out
    assert "effect of training" in shown
    assert "signatures:" in shown
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "validation" in page


@pytest.mark.slow
def test_again_it_answers_nothing_twice(trained: Path) -> None:
    run_evaluate(str(trained), [], FEW)
    file = trained / "evaluation/validation/after.jsonl"
    first, when = file.read_bytes(), file.stat().st_mtime_ns
    run_evaluate(str(trained), [], FEW)
    assert file.read_bytes() == first
    run_evaluate(str(trained), [], EvaluateOptions(max_new_tokens=4))  # other answers
    assert file.stat().st_mtime_ns != when
    assert all(json.loads(line)["completion_tokens"] <= 4 for line in file.read_text().splitlines())


@pytest.mark.slow
def test_a_model_alone_on_data(
    tiny_model_folder: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_jsonl([{"instruction": f"say {n}", "output": f"{n}"} for n in range(4)])
    options = EvaluateOptions(against="none", max_new_tokens=4, out=str(tmp_path / "out"), rows=3)
    run_evaluate(str(tiny_model_folder), [str(data)], options)
    found = content(tmp_path / "out")
    assert len(found["models"]) == 1
    assert found["data"]["rows"] == 3
    assert found["comparisons"] == []
    assert found["effect"] is None


@pytest.mark.slow
def test_training_without_an_effect_is_an_error(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(train={"epochs": 1})
    out = tmp_path / "run"
    fine_tune(load_recipe(recipe, [f"output={out}"]))
    from safetensors.torch import load_file, save_file

    file = out / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight * ("lora_B" not in name) for name, weight in weights.items()}, file)
    with pytest.raises(EvaluationError) as caught:
        run_evaluate(str(out), [], FEW)
    assert caught.value.code == "evaluate.no-effect"


@pytest.mark.slow
def test_files_of_predictions_are_compared_without_models(trained: Path, tmp_path: Path) -> None:
    run_evaluate(str(trained), [], FEW)
    folder = trained / "evaluation" / "validation"
    options = EvaluateOptions(
        against=str(folder / "before.jsonl"), out=str(tmp_path / "out"), metrics="exact_match,chrf"
    )
    run_evaluate(str(folder / "after.jsonl"), [], options)
    found = content(tmp_path / "out")
    assert [each["metric"] for each in found["comparisons"]] == ["exact_match", "chrf"]


def test_what_is_missing_is_said(tiny_model_folder: Path, trained: Path) -> None:
    with pytest.raises(RunError) as caught:
        run_evaluate(str(tiny_model_folder), [], FEW)
    assert caught.value.code == "run.none"
    with pytest.raises(RunError) as caught:
        run_evaluate(str(tiny_model_folder), [], EvaluateOptions(against="none"))
    assert caught.value.code == "run.no-validation"
    with pytest.raises(EvaluationError) as failed:
        run_evaluate(str(trained), [], EvaluateOptions(judge="http://127.0.0.1:1/v1"))
    assert failed.value.code == "evaluate.judge-model"
