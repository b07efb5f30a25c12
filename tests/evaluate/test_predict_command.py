"""The command on a tiny run: its result, its checkpoints, wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import make_rows, write_tiny_recipe
from tunesmith.cli.predict import PredictOptions, chosen_steps, run_predict
from tunesmith.config.load import load_recipe
from tunesmith.errors import DataError, ModelError, RecipeError, RunError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A finished run with a template of its own."""
    from tunesmith.train import train

    folder = tmp_path_factory.mktemp("predicted")
    recipe = write_tiny_recipe(
        folder, tiny_model_folder, train={"max_steps": 6}, data={"template": "chatml"}
    )
    train(load_recipe(str(recipe), []))
    return folder / "run"


@pytest.fixture
def data(write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(make_rows(5))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predict(target: Path | str, data: Path, out: Path, *more: str, **values: Any) -> None:
    options = PredictOptions(out=str(out), **{"max_new_tokens": 4, **values})
    run_predict(str(target), [str(data), *more], options)


def test_a_run_and_its_checkpoints(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    predict(run, data, out)
    shown = capsys.readouterr().out
    assert "5 rows, answered by" in shown
    assert "rows/s" in shown
    found = lines(out)
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5]
    assert found[0]["label"] == "answer 0"
    assert found[0]["prompt"].startswith("<|im_start|>user\nquestion 0")
    steps = chosen_steps(str(run), ["all", "best"])
    assert 6 in steps
    predict(run, data, out, checkpoints=("all",))
    last = lines(tmp_path / "out.step-6.jsonl")
    assert len(last) == 5
    assert last[0]["prompt"] == found[0]["prompt"]
    assert last[0]["id"] == found[0]["id"]
    predict(run, data, out)
    assert "were there already" in capsys.readouterr().out


def test_a_checkpoint_of_an_unfinished_run_has_its_template(
    run: Path, data: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "unfinished"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model", "summary.json"))
    with pytest.raises(ModelError, match=r"model\.unfinished-run"):
        predict(copy, data, tmp_path / "out.jsonl")
    predict(copy, data, tmp_path / "out.jsonl", checkpoints=("6",))
    predict(run, data, tmp_path / "whole.jsonl", checkpoints=("6",))
    one, other = (lines(tmp_path / f"{name}.step-6.jsonl") for name in ("out", "whole"))
    assert one == other


def test_tables_and_settings_of_the_command(run: Path, data: Path, tmp_path: Path) -> None:
    predict(run, data, tmp_path / "out.xlsx", rows=2, system="be kind", has_logprobs=True)
    found = lines(tmp_path / "out.jsonl")
    assert (tmp_path / "out.xlsx").stat().st_size > 1000
    assert len(found) == 2
    assert found[0]["messages"][0] == {"role": "system", "content": "be kind"}
    assert len(found[0]["logprobs"]) == found[0]["completion_tokens"]
    predict(run, data, tmp_path / "b.jsonl", "model.dtype=bfloat16", rows=2)
    said = json.loads((tmp_path / "b.jsonl.settings.json").read_text(encoding="utf-8"))
    assert said["dtype"] == "bfloat16"


def test_wrong_input(run: Path, data: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    for wrong, code in (
        ({"engine": "warp"}, r"recipe\.engine"),
        ({"engine": "vllm"}, r"recipe\.engine"),
    ):
        with pytest.raises(RecipeError, match=code):
            predict(run, data, out, **wrong)
    with pytest.raises(RunError, match=r"run\.no-checkpoint.*step 99"):
        predict(run, data, out, checkpoints=("99",))
    with pytest.raises(RunError, match=r"run\.no-checkpoint"):
        predict(run, data, out, checkpoints=("newest",))
    with pytest.raises(RunError, match=r"run\.none"):
        predict(tiny_model_folder, data, out, checkpoints=("all",))
    with pytest.raises(RunError, match=r"run\.predictions-format"):
        predict(run, data, tmp_path / "out.parquet")
    data.write_text(json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n")
    with pytest.raises(DataError, match=r"data\.overlong"):
        predict(run, data, out)
    assert not out.exists()


def test_vllm_gets_merged_weights(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in reads the folder that vLLM would read, before it is gone."""
    import sys
    from types import SimpleNamespace

    folders: list[list[str]] = []

    class StandIn:
        def __init__(self, model: str, **settings: Any) -> None:
            folders.append(sorted(item.name for item in Path(model).iterdir()))

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            answer = SimpleNamespace(token_ids=[65, 66, 258], finish_reason="stop")
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    stand_in = SimpleNamespace(LLM=StandIn, SamplingParams=lambda **values: values)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    predict(run, data, tmp_path / "out.jsonl", engine="vllm")
    assert {row["finish_reason"] for row in lines(tmp_path / "out.jsonl")} == {"stop"}
    assert "model.safetensors" in folders[0]
    assert "tokenizer.json" in folders[0]
    assert "adapter_config.json" not in folders[0]
