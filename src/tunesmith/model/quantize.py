"""Base models in nf4 or int8: loaded quantized, made dense one weight at a time.

Formats and modules are bitsandbytes' (nf4 of QLoRA, arXiv 2305.14314, `Linear4bit` and
`ops/nf4.py`; int8 of LLM.int8(), arXiv 2208.07339, `Linear8bitLt` and `ops/int8.py`), so PEFT's
adapters, merging and plain transformers work as ever. Embeddings, head and norms keep the compute
dtype; `prepare_model_for_kbit_training` is not called: it would make the norms fp32, and with them
all activations.

Of int8 only the weights are taken. bitsandbytes' own forward rounds a layer's inputs to int8 as
well, but for columns with one above 6, and its gradient is that of inputs as they were. Each layer
gets a forward that multiplies with the dense weight instead, so that training, validation, sampling
and chat compute the same. From it bitsandbytes' own differs more than the weights' rounding does:
SmolLM2-135M on 480 tokens of prose in fp32, mean KL 0.0026 between plain weights and these, 0.0132
between these and bitsandbytes' forward; the loss is 2.930, 2.934, and 2.940 there.

Shape letters: O outputs, I inputs, B blocks of 64 weights.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from tunesmith.config.method import MUTATING_INITS, AdapterConfig, LoraConfig
from tunesmith.config.recipe import Recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.ops.int8 import dequantize_into, scratch_numbers
from tunesmith.ops.lora import Dense, Projection, project
from tunesmith.ops.nf4 import BITS_PER_WEIGHT

__all__ = [
    "BITS_PER_WEIGHT",
    "DenseForward",
    "check_method",
    "check_quantized",
    "dense_weight",
    "free_buffers",
    "keep_layout",
    "num_quantizable",
    "quantization_arguments",
    "quantize_layers",
    "stored_bytes",
]

STORED = {"nf4": "4bit", "int8": "8bit"}
"""What transformers calls the bits of each kind."""

# PEFT imports bitsandbytes wherever it is installed, and bitsandbytes 0.50 then warns on CPUs with
# bfloat16 that an optional package for inference is absent. It is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check_method(recipe: Recipe) -> None:
    """Refuses a quantized base whose own weights are to be trained.

    Raises:
        RecipeError: `recipe.quantize`, with both keys.
    """
    method = recipe.method
    if isinstance(method, LoraConfig) and method.init == "loftq" and recipe.model.quantize != "nf4":
        raise RecipeError(
            "recipe.quantize",
            "method.init",
            found=f"`init: loftq` with `model.quantize: {recipe.model.quantize}`, which leaves "
            "little or no rounding to make up for",
            expected="`model.quantize: nf4`, or another `init`",
        )
    fits = isinstance(method, LoraConfig) and method.init not in MUTATING_INITS
    fits = fits or (isinstance(method, AdapterConfig) and method.is_prompt)
    if recipe.model.quantize != "none" and not fits:
        raise RecipeError(
            "recipe.quantize",
            "method",
            found=f"`model.quantize: {recipe.model.quantize}` with `method: {recipe.method.name}`",
            expected="`method: lora` with an `init` that leaves weights as they are, or virtual "
            "tokens: quantized weights cannot be trained themselves",
            try_="leave `model.quantize` out, or choose `method: lora`",
        )


# Loading


def quantization_arguments(
    label: str, config: Any, dtype: str, kind: str = "nf4"
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the linear layers, all but the head.

    Weights are quantized one by one as they are read, on the accelerator if there is one; the dense
    model is never in memory as a whole.

    Args:
        label: what the user calls the model.
        config: its configuration.
        dtype: numbers to compute with: float32, bfloat16, or auto for the files' own.
        kind: nf4 or int8.

    Raises:
        ModelError: bitsandbytes is not installed (`model.no-bitsandbytes`), or the files are
            quantized in another way (`model.quantized`).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.no-bitsandbytes",
            label,
            found=f"model.quantize: {kind}, and bitsandbytes is not installed",
            expected="the package bitsandbytes",
            try_="pip install 'tunesmith[quantize]'",
        )
    method = _method_of(config)
    if method == f"bitsandbytes {STORED[kind]}":
        return {}  # quantized already: the files say how
    if method is not None:
        raise ModelError(
            "model.quantized",
            label,
            found=f"weights that are quantized already ({method})",
            expected=f"plain weights for model.quantize: {kind}",
            try_="name the model that it was made from, or leave model.quantize out",
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization}


def check_quantized(model: Any, label: str) -> None:
    """Refuses a model that quantized loading left as it was.

    Raises:
        ModelError: no layer was quantized (`model.not-quantized`).
    """
    if not any(_quantized_layers(model)):
        raise ModelError(
            "model.not-quantized",
            label,
            found="no linear layer that bitsandbytes can quantize",
            expected="a model of linear layers",
            try_="leave model.quantize out",
        )


def keep_layout(model: torch.nn.Module) -> None:
    """Keeps quantized weights, if there are any, in the stored layout, and inputs as they are.

    On CPUs with bfloat16 nf4's first forward in eval mode would repack each weight for inference
    and round its magnitudes to bfloat16, for good: evaluation would change what is trained on
    (bitsandbytes 0.49 and 0.50, Linear4bit.forward). Layers in int8 get a `DenseForward`.
    """
    for layer in _quantized_layers(model):
        if _scale_of(layer) is None:
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.forward = DenseForward(layer)


@dataclass
class DenseForward:
    """The forward of a layer in int8: a product with its dense weight, inputs as they are."""

    module: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Projects the last dimension."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        projection = Projection(partial(_dense, self.module), self.module.bias)
        (y,) = project(x.reshape(-1, x.shape[-1]), [projection])
        return y.view(*x.shape[:-1], -1)


def quantize_layers(model: Any, dtype: torch.dtype, kind: str = "nf4") -> None:
    """Quantizes a loaded model in place; for models with random weights, in timing and tests.

    Args:
        model: on the device where it stays.
        dtype: numbers to compute with.
        kind: nf4 or int8.
    """
    make = _int8_layer if kind == "int8" else partial(_nf4_layer, dtype=dtype)
    for name, module in list(_quantizable(model)):
        layer = make(module)
        layer.bias = module.bias
        model.set_submodule(name, layer)
    setattr(model, f"is_loaded_in_{STORED[kind]}", True)  # PEFT's adapters look for it
    keep_layout(model)


def _nf4_layer(linear: torch.nn.Linear, dtype: torch.dtype) -> Any:
    import bitsandbytes

    nn: Any = bitsandbytes.nn  # its annotations hide half of the arguments
    layer = nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device=torch.device("meta"),
    )
    weight = nn.Params4bit(linear.weight.data, quant_type="nf4", module=layer)
    layer.weight = weight.to(device=linear.weight.device)
    return layer


def _int8_layer(linear: torch.nn.Linear) -> Any:
    import bitsandbytes

    nn: Any = bitsandbytes.nn
    sizes, device = (linear.in_features, linear.out_features), linear.weight.device
    layer = nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
    # From a CPU alone: on a device it takes weights for quantized ones.
    layer.weight = nn.Int8Params(linear.weight.data.cpu(), requires_grad=False).to(device)
    return layer


def _quantizable(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers but for the head: it may be the embedding, and its errors weigh most."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and module is not head:
            yield name, module


def _method_of(config: Any) -> str | None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values: Any = stored if isinstance(stored, dict) else stored.to_dict()
    method = getattr(values["quant_method"], "value", values["quant_method"])
    bits = next((bits for bits in STORED.values() if values.get(f"load_in_{bits}")), None)
    return f"{method} {bits}" if bits else str(method)


# Dense weights on demand


def dense_weight(linear: torch.nn.Module) -> Dense | None:
    """Gives the function that makes a layer's weight dense; None if it is not quantized.

    The result is `[O, I]`, without a gradient, and valid until the next call for any layer: use it
    in one matrix product. On CUDA, and of int8 everywhere, it lies in one buffer for each dtype, as
    large as the largest weight, so nothing is allocated; calls have to be on one stream.
    """
    if _state_of(linear) is None and _scale_of(linear) is None:
        return None
    return partial(_dense, linear)


def free_buffers() -> None:
    """Gives the memory of the buffers back, e.g. after a run."""
    _buffers.clear()


_buffers: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}


def _dense(linear: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    # Both are looked up anew: moving the model to a device replaces them.
    packed: Any = linear.weight
    made = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    if (scale_O := _scale_of(linear)) is not None:
        return _from_int8(linear, scale_O, made).to(dtype)
    state = packed.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("a weight repacked for inference: `keep_layout` comes before any forward")
    if packed.is_cuda:
        return _into_buffer(packed.data, state, made).to(dtype)
    return _as_new(packed.data, state, made).to(dtype)


def _into_buffer(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes without allocating: magnitudes first, then weights."""
    from bitsandbytes import functional

    magnitude_B = state.absmax
    if state.nested:
        magnitude_B = _buffer("magnitudes", state.absmax, state.absmax.shape, torch.float32)
        functional.dequantize_blockwise(state.absmax, state.state2, out=magnitude_B)
        magnitude_B.add_(state.offset)
    weight_OI = _buffer("weights", packed, state.shape, dtype)
    return functional.dequantize_4bit(
        packed,
        absmax=magnitude_B,
        out=weight_OI,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )


def _from_int8(linear: Any, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    codes_OI = linear.weight.data
    if scale_O.device != codes_OI.device:
        # `Module.to` moves the codes and nothing that hangs on them (bitsandbytes 0.50).
        scale_O = linear.weight.SCB = scale_O.to(codes_OI.device)
        linear.weight.CB = codes_OI
    weight_OI = _buffer("weights", codes_OI, codes_OI.shape, dtype)
    size = torch.Size([0 if dtype == torch.float32 else scratch_numbers(codes_OI)])
    return dequantize_into(
        weight_OI, codes_OI, scale_O, _buffer("products", codes_OI, size, torch.float32)
    )


def _as_new(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes on a CPU, where bitsandbytes cannot write into a given tensor.

    On two AVX512 cores, 576x1536 and 4096x4096 in bfloat16: 0.19 and 35 ms; a table lookup in plain
    torch into a buffer 0.92 and 70 ms. What the large one costs is fresh memory of the system: with
    malloc's thresholds raised (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) it is 12 ms.
    """
    from bitsandbytes import functional

    if state.dtype != dtype:
        state = copy.copy(state)
        state.dtype = dtype
    return functional.dequantize_4bit(packed, state)


def _buffer(use: str, like: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The buffer of a use, in this shape; it grows to the largest one asked for."""
    key, size = (use, like.device, dtype), prod(shape)
    held = _buffers.get(key)
    if held is None or held.numel() < size:
        held = _buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
    return held[:size].view(shape)


# Sizes


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, with what belongs to quantized ones."""
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    return plain + sum(
        tensor.numel() * tensor.element_size()
        for layer in _quantized_layers(model)
        for tensor in _tensors_of(layer)
    )


def num_quantizable(model: Any) -> int:
    """Weights that quantized loading would quantize.

    Args:
        model: plain, before adapters are attached; the meta device will do.
    """
    return sum(module.weight.numel() for _, module in _quantizable(model))


def _quantized_layers(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if dense_weight(module) is not None)


def _state_of(module: torch.nn.Module) -> Any:
    """What nf4 has besides the packed weight; None for any other weight."""
    return getattr(_own_weight(module), "quant_state", None)


def _scale_of(module: torch.nn.Module) -> torch.Tensor | None:
    """The scales of a weight in int8; None for any other weight."""
    weight: Any = _own_weight(module)
    if weight is None or weight.dtype != torch.int8 or not hasattr(weight, "SCB"):
        return None
    state: Any = getattr(module, "state", None)
    # bitsandbytes' own forward hands them from the weight to the layer's state.
    return state.SCB if weight.SCB is None and state is not None else weight.SCB


def _own_weight(module: torch.nn.Module) -> torch.nn.Parameter | None:
    # The parameter of the module itself: PEFT's layers show their base layer's as theirs.
    return dict(module.named_parameters(recurse=False)).get("weight")


def _tensors_of(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    if (scale_O := _scale_of(layer)) is not None:
        yield scale_O
        return
    state = _state_of(layer)
    outer = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
    yield from (state.absmax, state.code, *outer)
