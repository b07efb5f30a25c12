"""tunesmith's own forward for decoder layers of Llama's build, over their modules' parameters.

A layer keeps its class, its parameters and PEFT's adapters: `FastLayer` only stands in for its
`forward`. What it does not know is refused by name (`UnsuitableError`), never guessed.

Shape letters: T tokens, H hidden size, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.model.quantize import dense_weight
from tunesmith.ops.attention import attend_packed
from tunesmith.ops.blocks import gated_mlp, norm, norm_project, rotate_both
from tunesmith.ops.kept import Kept
from tunesmith.ops.lora import Projection, project, project_add

Level = Literal["none", "mlp", "attention", "full", "offload"]
"""What the backward of a layer makes again: norms and the SwiGLU product alone; gate and up, too;
all from the layer's input but attention itself, whose output is kept; all; the same, with the
layer's input kept in the host's memory."""


class UnsuitableError(Exception):
    """A module that the fast path does not know; the text says what is strange about it."""


@dataclass
class FastLayer:
    """The forward of one decoder layer.

    Args:
        layer: the decoder layer.
        inputs: q, k and v.
        output: what takes the heads back to the hidden size.
        mlp: gate, up and down.
        adapters: PEFT's modules among these.
        level: what the backward makes again.
    """

    layer: Any
    inputs: tuple[Projection, ...]
    output: Projection
    mlp: tuple[Projection, ...]
    adapters: tuple[Any, ...]
    level: Level = "none"

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the layer; without a segment table (in generation) as transformers would."""
        if kwargs.get("segments") is None:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        # Not [0]: its backward fills a whole tensor with zeros first.
        x_TH = hidden_states.squeeze(0)
        inputs = (x_TH, kwargs["position_embeddings"], kwargs["segments"])
        if self.level in ("none", "mlp") or not torch.is_grad_enabled():
            return self.forward(*inputs)[None]
        if self.level == "attention":
            return self._checkpointed(*inputs, Kept())[None]
        if self.level == "full":
            return self._checkpointed(*inputs)[None]
        with torch.autograd.graph.save_on_cpu(pin_memory=hidden_states.is_cuda):
            return self._checkpointed(*inputs)[None]

    def forward(
        self,
        x_TH: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        segments: Any,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Attention and MLP with their residual sums, on rows without a batch dimension."""
        layer, attention = self.layer, self.layer.self_attn
        inputs, output, mlp = self._projections()
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        x_TH, *heads = norm_project(x_TH, before.weight, before.variance_epsilon, inputs)
        query, key, value = (y.view(len(y), -1, attention.head_dim) for y in heads)
        if hasattr(attention, "q_norm"):
            query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
        query, key = rotate_both(query, key, angles[0][0], angles[1][0])
        window = sliding_window(attention)
        mixed_TND = attend_packed(
            query, key, value, segments, scaling=attention.scaling, window=window, kept=kept
        )
        x_TH = project_add(x_TH, mixed_TND.flatten(1), output)
        keeps_inner = self.level != "mlp"
        return gated_mlp(x_TH, after.weight, after.variance_epsilon, mlp, keeps_inner=keeps_inner)

    def _projections(
        self,
    ) -> tuple[tuple[Projection, ...], Projection, tuple[Projection, ...]]:
        if not any(_is_off(each) for each in self.adapters):
            return self.inputs, self.output, self.mlp
        (output,) = _bare([self.output])
        return _bare(self.inputs), output, _bare(self.mlp)

    def _checkpointed(self, *inputs: Any) -> Any:
        return checkpoint(self.forward, *inputs, use_reentrant=False, preserve_rng_state=False)


@dataclass
class FastNorm:
    """The forward of an RMS norm outside the layers."""

    module: Any

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norms the last dimension."""
        return _normed(self.module, hidden_states)


@dataclass
class FastLinear:
    """The forward of one adapted linear layer in a decoder layer of another build."""

    module: Any
    projection: Projection

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Projects the last dimension."""
        if args or kwargs or _is_off(self.module):
            return type(self.module).forward(self.module, x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        (y,) = project(x.reshape(-1, x.shape[-1]), [self.projection])
        return y.view(*x.shape[:-1], -1)


# Recognizing modules


LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION_NORMS = {"q_norm", "k_norm"}
ATTENTION_KINDS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""By name: others have the same parts and scale, rotate or window them in a way of their own, which
a check on short sequences need not see (Ministral 3 scales queries from 16,384 tokens on)."""
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def describe_layer(layer: Any) -> FastLayer:
    """Reads a decoder layer's parts.

    Raises:
        UnsuitableError: it has other ones.
    """
    _check_parts(layer, LAYER_PARTS, set())
    attention, mlp = layer.self_attn, layer.mlp
    _check_parts(attention, ATTENTION_PARTS, ATTENTION_NORMS)
    _check_parts(mlp, MLP_PARTS, set())
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ATTENTION_NORMS & _part_names(attention)]
    for module in norms:
        check_norm(module)
    if "forward" in vars(attention):
        raise UnsuitableError("attention with a forward of its own")
    if type(attention).__name__ not in ATTENTION_KINDS:
        raise UnsuitableError(f"attention of the kind {type(attention).__name__}")
    if getattr(attention, "attention_dropout", 0.0):
        raise UnsuitableError("attention dropout")
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise UnsuitableError(f"the activation {type(mlp.act_fn).__name__}")
    modules = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    modules += [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    projections = tuple(describe_projection(module) for module in modules)
    adapters = tuple(module for module in modules if is_adapted(module))
    return FastLayer(layer, projections[:3], projections[3], projections[4:], adapters)


def describe_projection(module: Any) -> Projection:
    """A linear layer's tensors, with those of its LoRA adapter.

    Raises:
        UnsuitableError: it is no linear layer, or its adapter is of a kind that PEFT alone knows.
    """
    if not is_adapted(module):
        return _of_linear(module)
    if len(module.active_adapters) != 1:
        raise UnsuitableError(f"{len(module.active_adapters)} active adapters")
    (name,) = module.active_adapters
    if name in module.lora_variant or getattr(module, "fan_in_fan_out", False):
        raise UnsuitableError("a variant of LoRA that PEFT alone computes")
    if not isinstance(module.lora_dropout[name], torch.nn.Identity):
        raise UnsuitableError("dropout before the adapters")
    if module.lora_bias.get(name):
        raise UnsuitableError("adapters with a bias")
    return replace(
        _of_linear(module.get_base_layer()),
        a_RI=module.lora_A[name].weight,
        b_OR=module.lora_B[name].weight,
        scale=float(module.scaling[name]),
    )


def is_adapted(module: Any) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def check_norm(module: Any) -> None:
    """Refuses a norm that is not Llama's RMS norm by its parts.

    Raises:
        UnsuitableError: it has a bias or no `variance_epsilon`.
    """
    if not hasattr(module, "variance_epsilon") or getattr(module, "bias", None) is not None:
        raise UnsuitableError(f"a norm of the kind {type(module).__name__}")


def sliding_window(attention: Any) -> int | None:
    """Tokens that a query sees back, itself included; None is all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    # Mistral's attention reads it from the configuration; Llama's has no window at all.
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None


def _of_linear(module: Any) -> Projection:
    if (dense := dense_weight(module)) is not None:
        return Projection(dense, module.bias)
    if type(module) is not torch.nn.Linear:
        raise UnsuitableError(f"a layer of the kind {type(module).__name__}")
    return Projection(module.weight, module.bias)


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, module.weight, module.variance_epsilon)


def _is_off(module: Any) -> bool:
    return module.disable_adapters or module.merged


def _bare(projections: Sequence[Projection]) -> tuple[Projection, ...]:
    return tuple(replace(each, a_RI=None, b_OR=None) for each in projections)


def _part_names(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _check_parts(module: Any, needed: set[str], allowed: set[str]) -> None:
    found, kind = _part_names(module), type(module).__name__
    if missing := sorted(needed - found):
        raise UnsuitableError(f"{kind} without {', '.join(missing)}")
    if strange := sorted(found - needed - allowed):
        raise UnsuitableError(f"{kind} with {', '.join(strange)}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsuitableError(f"{kind} with hooks")
