"""First values of LoRA that follow the quantizer (LoftQ) or the data (EVA)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from conftest import TINY_SIZES
from tunesmith.config.load import recipe_from
from tunesmith.config.method import LoraConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.adapters import attach, save_weights
from tunesmith.model.eva import Directions, learn_directions
from tunesmith.model.load import ModelSource, load_model, random_model
from tunesmith.model.loftq import make_up_for_rounding
from tunesmith.model.quantize import check_method, dense_weight
from tunesmith.objectives.lm import decode
from tunesmith.types import GlobalBatch, PackedBatch

SIZES: dict[str, Any] = {
    **TINY_SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
WIDE = LlamaConfig(**SIZES)
CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def lora(**values: Any) -> LoraConfig:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, **values}
    return LoraConfig(**settings)


def base() -> Any:
    torch.manual_seed(0)
    return random_model(WIDE, is_bf16=False)


def batches(count: int = 4, length: int = 60) -> list[PackedBatch]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 101, length).astype(np.int32) for _ in range(count)]
    return [build_batch([(0, TokenSequence(ids, ((3, length - 3, 1.0),)))]) for ids in rows]


def steps(micro_batches: list[PackedBatch]) -> Any:
    """A run whose steps have one micro-batch each, over and over."""

    def batch_of(step: int) -> GlobalBatch:
        micro = micro_batches[step % len(micro_batches)]
        return GlobalBatch(0, (0,), (micro,), 1.0, 1, micro.num_tokens)

    return batch_of


def adapted(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


# LoftQ


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    base().save_pretrained(tmp_path / "plain")
    return ModelSource("plain", str(tmp_path / "plain"))


def quantized(source: ModelSource) -> Any:
    return load_model(source, dtype="float32", quantize="nf4")


def rest(layer: Any, plain_OI: torch.Tensor, *, with_adapter: bool) -> float:
    dense = dense_weight(layer.base_layer)
    assert dense is not None
    found_OI = dense(torch.float32).clone()
    if with_adapter:
        found_OI += layer.get_delta_weight("default").detach()
    return float((plain_OI - found_OI).norm())


@needs_bitsandbytes
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_makes_up_for_rounding(source: ModelSource, rslora: bool) -> None:
    """As near to the plain weights as any product of the rank: Eckart and Young's bound."""
    model = attach(quantized(source), lora(init="loftq", rslora=rslora, rank=8))
    plain = dict(base().named_modules())
    assert make_up_for_rounding(model, source) == 14
    for name, layer in adapted(model).items():
        plain_OI = plain[name.removeprefix("base_model.model.")].weight.detach()
        before = rest(layer, plain_OI, with_adapter=False)
        after = rest(layer, plain_OI, with_adapter=True)
        dense = dense_weight(layer.base_layer)
        assert dense is not None
        values = torch.linalg.svdvals(plain_OI - dense(torch.float32))
        best = float(values[8:].norm())
        assert after < 0.9 * before
        assert after <= 1.01 * best


@needs_bitsandbytes
def test_loftq_loads_in_plain_peft_on_the_same_quantized_base(
    source: ModelSource, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = attach(quantized(source), lora(init="loftq"))
    make_up_for_rounding(model, source)
    save_weights(model, tmp_path / "result")
    again: Any = PeftModel.from_pretrained(quantized(source), str(tmp_path / "result"))
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
        without = quantized(source).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.equal(without, expected)


@needs_bitsandbytes
def test_loftq_needs_the_plain_weights(source: ModelSource, tmp_path: Path) -> None:
    model = attach(quantized(source), lora(init="loftq"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
    other = LlamaConfig(**sizes)
    random_model(other, is_bf16=False).save_pretrained(tmp_path / "short")
    with pytest.raises(ModelError) as caught:
        make_up_for_rounding(model, ModelSource("short", str(tmp_path / "short")))
    assert caught.value.code == "model.no-plain-weight"


def test_loftq_goes_with_a_quantized_base_alone() -> None:
    tree: dict[str, Any] = {"model": "m", "data": "d", "method": "loftq"}
    with pytest.raises(RecipeError) as caught:
        check_method(recipe_from(tree))
    assert caught.value.code == "recipe.quantize"
    check_method(recipe_from({**tree, "model": {"id": "m", "quantize": "nf4"}}))


# EVA


def test_directions_are_those_of_all_vectors_at_once() -> None:
    torch.manual_seed(0)
    scale = 0.7 ** torch.arange(20.0)
    vectors_NI = torch.randn(400, 20) * scale + torch.randn(20)
    directions = Directions(5)
    for part in vectors_NI.split(80):
        directions.add(part)
    _, _, v_RI = torch.linalg.svd(vectors_NI - vectors_NI.mean(0), full_matrices=False)
    cosines = (directions.found() * v_RI[:5]).sum(1).abs()
    assert cosines.min() > 0.98
    torch.testing.assert_close(directions.mean_I, vectors_NI.mean(0))
    assert directions.count == 400


def test_eva_equals_pefts_on_the_same_batches() -> None:
    """PEFT's own incremental decomposition of the same inputs, up to signs."""
    from peft.utils.incremental_pca import IncrementalPCA

    model = attach(base(), lora(init="eva"))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    data = batches()
    learn_directions(model, steps(data), CPU)
    handle.remove()
    pca = IncrementalPCA(n_components=4, lowrank=False)
    for number, inputs_TI in enumerate(seen):
        pca.partial_fit(inputs_TI[data[number % len(data)].row_N])
    found = layer.lora_A["default"].weight.detach()
    cosines = (found * pca.components_).sum(1).abs()
    assert cosines.min() > 0.99


def test_eva_shares_what_is_given_to_several_layers() -> None:
    model, plain = attach(base(), lora(init="eva", rank_pattern={"k_proj": 2})), base()
    learn_directions(model, steps(batches()), CPU)
    attention = model.get_base_model().model.layers[0].self_attn
    q, k, o = (getattr(attention, f"{name}_proj").lora_A["default"].weight for name in "qko")
    assert torch.equal(q[:2], k)
    assert not torch.equal(q, o)
    with torch.no_grad():
        batch = batches(1)[0]
        assert torch.equal(
            decode(model.eval().get_base_model(), batch), decode(plain.eval(), batch)
        )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_eva_is_the_same_every_time_and_leaves_no_trace_in_the_generator() -> None:
    torch.manual_seed(3)
    models = [attach(base(), lora(init="eva")) for _ in range(2)]
    for model in models:
        before = torch.get_rng_state()
        learn_directions(model, steps(batches()), CPU)
        assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(*(model.named_parameters() for model in models), strict=True):
        if "lora_A" in first[0]:
            torch.testing.assert_close(first[1] @ first[1].T, torch.eye(4), rtol=0, atol=1e-4)
        assert torch.equal(first[1], second[1])


def test_few_tokens_leave_the_other_rows_as_drawn() -> None:
    model = attach(base(), lora(init="eva", rank=16))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    drawn = layer.lora_A["default"].weight.detach().clone()
    once = batches(1, 9)
    nothing = build_batch([(0, TokenSequence(np.arange(1, 9, dtype=np.int32), ()))])
    learn_directions(model, steps([*once, *[nothing] * 15]), CPU)
    found = layer.lora_A["default"].weight
    assert torch.equal(found[9:], drawn[9:])
    assert not torch.equal(found[0], drawn[0])
