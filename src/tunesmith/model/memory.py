"""What a run will need: from the model's configuration, and from tiny steps on the real model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.config.budget import Level, Needs
from tunesmith.config.method import (
    AdapterConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    Method,
    auto_alpha,
)
from tunesmith.config.recipe import Recipe
from tunesmith.errors import ModelError
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.fast_layer import UnsuitableError, describe_layer
from tunesmith.model.heads import Head
from tunesmith.model.layers import decoder_of, first_trainable_layer, layer_list
from tunesmith.model.load import model_class
from tunesmith.model.optimizer_bytes import Trained, optimizer_bytes, trained_of
from tunesmith.ops.linear_logp import BLOCK_BYTES, CHUNK_BYTES
from tunesmith.types import PackedBatch, Segments

NF4_BYTES = 0.52
"""Of a weight quantized to NF4 with double quantization: 4.127 bits (arXiv 2305.14314)."""
INT8_BYTES = 1.005
"""Of a weight in int8 with an fp32 scale for each row (arXiv 2208.07339): 1 and 4 a row."""

RUNTIME_BYTES = {"cpu": 380 * 2**20, "cuda": 96 * 2**20, "mps": 100 * 2**20}
"""What training takes besides tensors once the weights are there. On a CPU it is the process: 60 MB
of modules and of what loading left, 150 MB of oneDNN's kernels (30 for each of the last five
numbers of rows) with their scratch, and what validation leaves (800 to 1,000 MiB before the first
step)."""

HOLES = 0.08
"""Of the tensors of a step, what a CPU's heap loses between them when it is trimmed."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model and of what is trained of it.

    Args:
        num_parameters: of the model without adapters.
        num_trained: adapters, or weights of the model itself.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        context_tokens: the longest sequence the model knows.
        num_embeddings: rows of the embedding.
        query_size: width of all query heads together.
        key_size: width of all key heads together; values have as much.
        num_linear: parameters of the linear layers inside decoder layers.
        adapter_ranks: ranks of all adapters of a layer added up.
        trained_layers: layers from the first trained one to the last: only they keep anything.
        is_known: the layers have our own forward and backward.
    """

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    context_tokens: int
    num_embeddings: int
    query_size: int
    key_size: int
    num_linear: int
    adapter_ranks: int
    trained_layers: int
    is_known: bool
    trained: Trained = ()
    """Name and shape of each parameter that is trained."""
    has_scores: bool = False
    """A few scores stand in the place of the vocabulary's logits."""


def measure_config(config: Any, method: Method, head: Head | None = None) -> Sizes:
    """Counts a model's parameters, and those that a method trains, without making them.

    Args:
        config: of the model.
        method: of the recipe.
        head: what takes the place of the vocabulary's logits, with any labels.

    Raises:
        ModelError: it is no causal language model (`model.unreadable`).
        RecipeError: the method's target names no layer.
    """
    with torch.device("meta"):
        try:
            model = model_class(head).from_config(config)
        except (ValueError, KeyError) as error:
            raise ModelError(
                "model.unreadable",
                type(config).__name__,
                found=str(error).splitlines()[0],
                expected="a causal language model",
            ) from error
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        num_linear = _count_linear(model)
        num_embeddings = model.get_input_embeddings().num_embeddings
    # Other kinds than LoRA read numbers that they make, which the meta device does not have.
    with torch.device("cpu" if isinstance(method, AdapterConfig) else "meta"):
        trained = attach(model, _with_numbers(method))
    text = config.get_text_config()
    hidden, num_layers = text.hidden_size, text.num_hidden_layers
    heads = getattr(text, "num_attention_heads", None) or 1
    head_size = getattr(text, "head_dim", None) or hidden // heads
    return Sizes(
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for _, p in trainable_parameters(trained)),
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        context_tokens=getattr(text, "max_position_embeddings", None) or 4096,
        num_embeddings=num_embeddings,
        query_size=heads * head_size,
        key_size=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        num_linear=num_linear,
        adapter_ranks=_ranks_per_layer(trained),
        trained_layers=num_layers - first_trainable_layer(trained),
        is_known=_is_known(trained),
        trained=trained_of(trainable_parameters(trained)),
        has_scores=head is not None,
    )


def estimate_needs(
    sizes: Sizes, recipe: Recipe, *, is_bf16: bool, device_kind: str = "cpu", used_bytes: int = 0
) -> Needs:
    """Estimates the memory of a recipe's steps on a model.

    Args:
        sizes: of the model.
        recipe: what to do with it.
        is_bf16: whether it computes in bfloat16.
        device_kind: cpu, cuda or mps.
        used_bytes: what the process uses on the device before the weights come.
    """
    width = 2 if is_bf16 else 4
    is_full = isinstance(recipe.method, FullConfig)
    weights = sizes.num_parameters * width
    quantized_bytes = {"none": width, "nf4": NF4_BYTES, "int8": INT8_BYTES}[recipe.model.quantize]
    weights -= round(sizes.num_linear * (width - quantized_bytes))
    trains_head = is_full or (
        isinstance(recipe.method, FreezeConfig) and (recipe.method.head or recipe.method.embeddings)
    )
    # PEFT writes trained rows into a copy of the matrix, which gets a whole gradient.
    trains_head |= isinstance(recipe.method, LoraConfig) and bool(recipe.method.train_tokens)
    num_logits = 0 if sizes.has_scores else sizes.num_embeddings
    head_gradient = 4 * num_logits * sizes.hidden_size if trains_head else 0
    hidden = sizes.hidden_size * width
    working = (4 * sizes.intermediate_size + 4 * sizes.hidden_size) * width
    layers: dict[Level, float] = dict(kept_per_token(sizes, width))
    if isinstance(recipe.method, LoraConfig) and recipe.method.dora:
        more = _dora_per_token(sizes, width)
        layers = {level: size + more for level, size in layers.items()}
    if device_kind != "cuda":
        layers.pop("offload", None)  # the device's memory is the host's
    return Needs(
        weight_bytes=weights,
        optimizer_bytes=_trained_bytes(sizes, recipe, is_bf16=is_bf16),
        other_bytes=used_bytes + RUNTIME_BYTES[device_kind],
        layers=layers,
        num_layers=sizes.trained_layers,
        # The last layer's output and its norm, the head's gradient; ids, positions and angles.
        rest=4 * hidden + 16 + 8 * sizes.key_size // max(1, sizes.key_size // 64),
        working=working,
        head_bytes=4 * BLOCK_BYTES * (num_logits > 0) + head_gradient,
        head_per_token=num_logits * width,
        head_most=CHUNK_BYTES,
        holes=0.0 if device_kind == "cuda" else HOLES,
    )


def kept_per_token(sizes: Sizes, width: int) -> Mapping[Level, float]:
    """Bytes that one decoder layer keeps of a token for its backward, by level.

    Our own layers keep their two inputs, q, k and v, the attention's output with its logarithms,
    gate and up, and a few numbers for norms and adapters; at `attention` one input and attention's
    output with its logarithms (which the processor's short segments in bfloat16 do without), at
    `full` the input alone. Transformers' own keep more: counted with
    saved_tensors_hooks on Llama layers (H=576, F=1536) 42.7 KB a token in fp32 with LoRA, 46.9 KB
    without, 27.4 and 25.8 KB in bfloat16, whose norms keep fp32 besides.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    if not sizes.is_known:
        norms = 10 * hidden if width == 2 else 0
        return {"none": (8 * hidden + 4 * inner) * width + norms}
    heads = 2 * sizes.query_size + 2 * sizes.key_size
    logs = 4 * max(1, sizes.query_size // 64)
    small = sizes.adapter_ranks * width + 2 * 4 + logs
    without_inner = (2 * hidden + heads) * width + small
    return {
        "none": without_inner + 2 * inner * width,
        "mlp": without_inner,
        "attention": (hidden + sizes.query_size) * width + logs,
        "full": hidden * width,
        "offload": 0.0,
    }


def _dora_per_token(sizes: Sizes, width: int) -> float:
    """Bytes that DoRA keeps of a token in a layer: both summands of every projection's output."""
    outputs = sizes.query_size + 2 * sizes.key_size + 2 * sizes.hidden_size
    return 2 * (outputs + 2 * sizes.intermediate_size) * width


# From tiny steps


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Live tensors of one step beyond what was there before it.

    Args:
        kept: when the backward begins.
        peak: the most at any time.
    """

    kept: int
    peak: int


def refine_needs(
    needs: Needs, measure: Callable[[int], StepBytes], sizes: tuple[int, int]
) -> Needs:
    """Needs whose bytes per token come from two steps of different size.

    Live memory is linear in tokens, so tiny steps say as much as large ones. They run with a single
    supervised row: the head's memory, which is not linear, stays as computed.

    Args:
        needs: the estimate, for the levels that the steps ran with.
        measure: runs a step of so many tokens.
        sizes: the tokens of the two steps.
    """
    small, large = sorted(sizes)
    first, second = measure(small), measure(large)
    kept = (second.kept - first.kept) / (large - small)
    peak = (second.peak - first.peak) / (large - small)
    factor = max(0.0, kept - needs.rest) / max(1.0, needs.layers["none"] * needs.num_layers)
    return replace(
        needs,
        layers={level: size * factor for level, size in needs.layers.items()},
        working=max(0.0, peak - kept),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are still alive, and their peak.

    Not counted: what a kernel takes and gives back within one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Runs an operation and takes note of the storages of its results."""
        given = {
            id(_storage(x)) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._note(_storage(result), given)
        return results

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def measure_step(
    forward: Callable[[int], torch.Tensor], num_tokens: int, device: torch.device
) -> StepBytes:
    """Live bytes of a forward and backward of so many tokens.

    CUDA's allocator counts them itself. On a CPU the resident set of such small steps says little,
    so tensors are counted as they come and go.

    Args:
        forward: gives the loss of a batch of so many tokens.
        num_tokens: of the batch.
        device: where the model is.
    """
    if device.type == "cuda":
        return _measure_cuda(forward, num_tokens)
    live = LiveBytes()
    with live:
        loss = forward(num_tokens)
        kept = live.now
        loss.backward()
    return StepBytes(kept, live.peak)


def probe_batch(num_tokens: int, device: torch.device) -> PackedBatch:
    """A batch of one sequence with a single supervised row."""
    ids_T, last = torch.arange(num_tokens) % 97, torch.tensor([num_tokens - 2])
    return PackedBatch(
        ids_T=ids_T,
        position_T=torch.arange(num_tokens),
        segments=Segments((num_tokens,)),
        row_N=last,
        target_N=ids_T[last + 1],
        weight_N=torch.ones(1),
        sample_N=torch.zeros(1, dtype=torch.int64),
        sequence_N=torch.zeros(1, dtype=torch.int64),
        last_S=torch.tensor([num_tokens - 1]),
        group_GK=torch.empty(0, 1, dtype=torch.int64),
        label_G=torch.empty(0),
        num_tokens=num_tokens,
        loss_weight=1.0,
    ).to(device)


def _measure_cuda(forward: Callable[[int], torch.Tensor], num_tokens: int) -> StepBytes:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward(num_tokens)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    return StepBytes(kept, torch.cuda.max_memory_allocated() - before)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _trained_bytes(sizes: Sizes, recipe: Recipe, *, is_bf16: bool) -> int:
    """Of the optimizer, and of adapters, in fp32, themselves."""
    is_adapter = isinstance(recipe.method, LoraConfig | AdapterConfig)
    trained = sizes.trained or (("", (sizes.num_trained,)),)
    is_bf16 = is_bf16 and not is_adapter
    return 4 * is_adapter * sizes.num_trained + optimizer_bytes(
        trained, recipe.train.optimizer, is_bf16=is_bf16
    )


def _count_linear(model: Any) -> int:
    _, layers = layer_list(decoder_of(model))
    linear = [m for m in layers.modules() if isinstance(m, torch.nn.Linear)]
    return sum(module.weight.numel() for module in linear)


def _ranks_per_layer(model: Any) -> int:
    """Ranks of the last layer's adapters added up."""
    _, layers = layer_list(decoder_of(model))
    return sum(p.shape[0] for name, p in layers[-1].named_parameters() if ".lora_A." in name)


def _is_known(model: Any) -> bool:
    decoder = decoder_of(model)
    try:
        describe_layer(layer_list(decoder)[1][0])
    except UnsuitableError:
        return False
    return True


def _with_numbers(method: Method) -> Method:
    """The method as it can be attached to a model without weights."""
    if isinstance(method, AdapterConfig) and method.kind == "PROMPT_TUNING":
        return method.model_copy(update={"prompt_tuning_init": "RANDOM"})
    if not isinstance(method, LoraConfig):
        return method
    rank = 16 if method.rank == "auto" else method.rank
    alpha = auto_alpha(method, rank)[0]
    return method.model_copy(update={"rank": rank, "alpha": alpha, "init": "default"})
