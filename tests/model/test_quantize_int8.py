"""A base in int8: modules of bitsandbytes, a forward of its own, a run that goes on bit for bit."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_tiny_config
from engine.runs import final_bytes, run_and_stop, run_to_end
from tunesmith.config.load import recipe_from
from tunesmith.config.recipe import LoraConfig
from tunesmith.errors import RecipeError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.model.adapters import attach
from tunesmith.model.fast_path import fast_layers, make_fast
from tunesmith.model.load import PACKED_ATTENTION, ModelSource, load_model
from tunesmith.model.quantize import (
    _buffers,
    check_method,
    dense_weight,
    free_buffers,
    num_quantizable,
    stored_bytes,
)
from tunesmith.types import SilentReporter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("int8") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(make_tiny_config(hidden_size=64, intermediate_size=192)).save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path) -> Callable[..., Any]:
    def made(dtype: str = "float32", quantize: str = "int8", attention: str = "sdpa") -> Any:
        source = ModelSource("tiny", str(folder))
        return load_model(source, dtype=dtype, attention=attention, quantize=quantize)

    return made


@pytest.fixture(autouse=True)
def _no_buffers_left() -> Iterator[None]:
    free_buffers()
    yield
    free_buffers()


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_int8_stays_in_modules_of_bitsandbytes(load: Callable[..., Any]) -> None:
    model = load("bfloat16")
    names = {name for name, linear in linears(model).items() if dense_weight(linear)}
    assert names == set(linears(model)) - {"lm_head"}
    kinds = {type(linears(model)[name]).__name__ for name in names}
    assert kinds == {"Linear8bitLt"}
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.int8)


def test_int8_is_a_byte_a_weight_and_four_a_row(load: Callable[..., Any]) -> None:
    plain, model = load(quantize="none"), load()
    rows = sum(each.out_features for each in linears(model).values() if dense_weight(each))
    saved = 3 * num_quantizable(plain) - 4 * rows
    assert stored_bytes(model) == stored_bytes(plain) - saved


def test_files_in_int8_give_the_bits_they_were_made_of(
    load: Callable[..., Any], tmp_path: Path
) -> None:
    model = load("bfloat16")
    model.save_pretrained(tmp_path)
    source = ModelSource("tiny", str(tmp_path))
    again = load_model(source, dtype="bfloat16", quantize="int8")
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight.data, linears(again)[name].weight.data)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_loftq_makes_up_for_nf4_alone() -> None:
    tree: dict[str, Any] = {"data": "d", "method": "loftq"}
    check_method(recipe_from({**tree, "model": {"id": "m", "quantize": "nf4"}}))
    with pytest.raises(RecipeError, match=r"`init: loftq` with `model\.quantize: int8`"):
        check_method(recipe_from({**tree, "model": {"id": "m", "quantize": "int8"}}))


def test_int8_allocates_two_buffers_for_all_weights(load: Callable[..., Any]) -> None:
    functions = [dense_weight(linear) for linear in linears(load()).values()]
    places = {make(torch.bfloat16).data_ptr() for make in functions[4:] if make}
    assert len(places) == 1  # from the largest weight on
    assert sorted(_buffers) == [
        ("products", torch.device("cpu"), torch.float32),
        ("weights", torch.device("cpu"), torch.bfloat16),
    ]


def test_scales_of_int8_where_the_forward_of_bitsandbytes_puts_them(
    load: Callable[..., Any],
) -> None:
    model = load()
    linear, size = linears(model)["model.layers.0.mlp.up_proj"], stored_bytes(model)
    dense: Any = dense_weight(linear)
    before = dense(torch.float32).clone()
    del linear.forward
    linear(torch.ones(1, 64))
    assert linear.weight.SCB is None
    assert torch.equal(dense(torch.float32), before)
    assert stored_bytes(model) == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_get_our_forward(load: Callable[..., Any], dtype: str) -> None:
    """It is compared with that of transformers and PEFT, which must not round its inputs."""
    base = load(dtype, attention=PACKED_ATTENTION)
    model = attach(base, LoraConfig(name="lora", rank=4, alpha=8.0))
    assert make_fast(model).startswith("own forward and backward for all 2 layers")
    assert len(fast_layers(model)) == 2


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_adapter_loads_in_plain_libraries(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tiny_recipe()
    values = json.loads(path.read_text())
    values["model"]["quantize"] = "int8"
    path.write_text(json.dumps(values))
    summary = run_to_end(path, tmp_path / "whole")
    assert summary["eval_loss"] < summary["eval_loss_before"]
    run_and_stop(path, tmp_path / "run", 8)
    run_to_end(path, tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")
    chat = open_chat_model(str(tmp_path / "run"), SilentReporter())
    base: Any = AutoModelForCausalLM.from_pretrained(
        values["model"]["id"],
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
    )
    plain = PeftModel.from_pretrained(
        base.dequantize(dtype=torch.float32), str(tmp_path / "run" / "model")
    ).eval()
    with torch.no_grad():
        ours = chat.model(IDS.to(chat.model.device)).logits.cpu()
        theirs = plain(IDS.to(plain.device)).logits.cpu()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
