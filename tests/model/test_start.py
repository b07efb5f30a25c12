"""Training that goes on from an adapter, or on top of a merged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import final_bytes, run_and_stop, run_to_end
from tunesmith.config.load import recipe_from
from tunesmith.config.method import LoraConfig
from tunesmith.errors import TunesmithError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.model.adapters import attach, save_weights, trainable_parameters
from tunesmith.model.load import ModelSource, load_model
from tunesmith.model.start import continue_start, continued, merged_start
from tunesmith.types import SilentReporter

IDS = torch.arange(7)[None]


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, **values})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def source(tiny_model_folder: Path) -> ModelSource:
    return ModelSource("tiny", str(tiny_model_folder))


def write_adapter(source: ModelSource, folder: Path, method: Any) -> torch.Tensor:
    """Writes an adapter with some values; returns the logits of the model with it."""
    torch.manual_seed(1)
    model = attach(load_model(source), method)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_weights(model, folder)
    return logits(model)


def recipe(method: dict[str, Any], **model: Any) -> Any:
    return recipe_from(
        {"model": {"id": "m", "adapter": "a", **model}, "data": "d", "method": method}
    )


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


METHODS = {
    "plain": lora(),
    "layers": lora(layers=1),
    "dora of ranks": lora(dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3.0}),
    "modules": lora(rslora=True, train_modules=["norm"], target=r".*\.(q|v)_proj"),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_an_adapter(name: str, source: ModelSource, tmp_path: Path) -> None:
    expected = write_adapter(source, tmp_path, METHODS[name])
    method = continued(recipe({"name": "lora", "dropout": 0.1}), settings_of(tmp_path), "a")
    assert method.dropout == 0.1
    start = ModelSource(source.label, source.path, adapter=str(tmp_path))
    model = attach(load_model(start), method)
    continue_start(model, start)
    assert torch.equal(logits(model), expected)
    again = attach(load_model(source), METHODS[name])
    names = {key for key, _ in trainable_parameters(again)}
    assert {key for key, _ in trainable_parameters(model)} == names


@pytest.mark.parametrize("method", [lora(), lora(init="pissa", alpha=4.0), lora(target=["q_proj"])])
def test_an_adapter_on_top_of_a_merged_one_is_one_adapter(
    method: LoraConfig, source: ModelSource, tmp_path: Path
) -> None:
    from peft import PeftModel

    first = write_adapter(source, tmp_path / "first", lora(rank_pattern={"k_proj": 2}))
    start = ModelSource(source.label, source.path, adapter=str(tmp_path / "first"))
    base, changes = merged_start(load_model(start), start)
    assert not hasattr(base, "peft_config")
    torch.testing.assert_close(logits(base), first)
    model = attach(base, method, merged=changes)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = logits(model)
    assert (expected - first).abs().max() > 1e-3
    save_weights(model, tmp_path / "second")
    again: Any = PeftModel.from_pretrained(load_model(source), str(tmp_path / "second"))
    torch.testing.assert_close(logits(again), expected)


@pytest.mark.parametrize(
    ("method", "model", "changes", "code"),
    [
        ({"name": "lora", "rank": 8}, {}, {}, "recipe.adapter"),
        ({"name": "full"}, {}, {}, "recipe.adapter"),
        ({"name": "lora"}, {}, {"peft_type": "IA3"}, "model.bad-adapter"),
        ({"name": "lora"}, {}, {"lora_bias": True}, "model.bad-adapter"),
        ({"name": "lora"}, {}, {"init_lora_weights": "pissa"}, "model.bad-adapter"),
        ({"name": "lora"}, {}, {"lora_alpha": "x"}, "model.bad-adapter"),
        ({"name": "dora"}, {"merge_adapter": True}, {}, "recipe.adapter"),
        ({"name": "ia3"}, {"merge_adapter": True}, {}, "recipe.adapter"),
        ({"name": "lora"}, {"merge_adapter": True}, {"use_dora": True}, "recipe.adapter"),
    ],
)
def test_adapters_that_cannot_be_gone_on_from(
    method: dict[str, Any],
    model: dict[str, Any],
    changes: dict[str, Any],
    code: str,
    source: ModelSource,
    tmp_path: Path,
) -> None:
    from tunesmith.model.start import with_adapter

    write_adapter(source, tmp_path / "a", lora())
    values = {**settings_of(tmp_path / "a"), **changes}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(TunesmithError) as caught:
        with_adapter(recipe(method, **model), source, SilentReporter(), tmp_path)
    assert caught.value.code == code


def test_weights_of_another_adapter(source: ModelSource, tmp_path: Path) -> None:
    write_adapter(source, tmp_path, lora(rank=2))
    start = ModelSource(source.label, source.path, adapter=str(tmp_path))
    with pytest.raises(TunesmithError, match="other weights"):
        continue_start(attach(load_model(start), lora()), start)


@pytest.mark.slow
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_a_run_from_an_adapter(
    merges: bool, method: str, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    if method == "freeze" and not merges:
        pytest.skip("only LoRA goes on from an adapter")
    first = run_to_end(tiny_recipe(train={"epochs": 2}), tmp_path / "first")
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "adapter")
    path = tiny_recipe(train={"epochs": 2})
    values = json.loads(path.read_text())
    values["model"] |= {"adapter": "adapter", "merge_adapter": merges}
    path.write_text(json.dumps({**values, "method": method}))
    summary = run_to_end(path, tmp_path / "whole")
    assert summary["eval_loss_before"] == pytest.approx(first["eval_loss"], abs=1e-4)
    assert summary["eval_loss"] < first["eval_loss"]
    run_and_stop(path, tmp_path / "parts", 3)
    run_to_end(path, tmp_path / "parts")
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    open_chat_model(str(tmp_path / "whole"), SilentReporter())
