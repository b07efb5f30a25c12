"""What GGUF says of each family of models: its keys, and how its weights are turned.

Shape letters: O outputs, I inputs, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.errors import UserError


@dataclass(frozen=True)
class Family:
    """A family of models in llama.cpp.

    Args:
        architecture: llama.cpp's name.
        turns_heads: whether rotary positions pair neighbors there, which transformers pairs by
            halves: rows of the query and key matrices then change places.
        adds_one: whether norms multiply by 1 + w in transformers and by the file's w there.
    """

    architecture: str
    turns_heads: bool = False
    adds_one: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", turns_heads=True),
    "mistral": Family("llama", turns_heads=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", adds_one=True),
    "gemma2": Family("gemma2", adds_one=True),
    "gemma3_text": Family("gemma3", adds_one=True),
}
"""By transformers' `model_type`."""


def family_of(config: Any, label: str) -> Family:
    """The family of a model.

    Raises:
        UserError: it is none of those that are written (`export.gguf-family`).
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(
            "export.gguf-family",
            label,
            found=f"a model of the type {kind}",
            expected=f"one of {', '.join(FAMILIES)}",
            try_="`--to merged`, and llama.cpp's own convert_hf_to_gguf.py on that folder",
        )
    return FAMILIES[kind]


def write_keys(writer: Any, config: Any, *, num_rows: int, label: str) -> tuple[str, ...]:
    """Writes a model's numbers; gives what is worth saying.

    Args:
        writer: of the gguf package.
        config: transformers'.
        num_rows: of the embedding.
        label: what the user calls the model.

    Raises:
        UserError: llama.cpp does not compute such a model (`export.gguf-family`).
    """
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_vocab_size(num_rows)
    notes: tuple[str, ...] = ()
    if config.model_type in ("gemma2", "gemma3_text"):
        _write_gemma(writer, config, label)
    elif getattr(config, "sliding_window", None) and _uses_window(config):
        notes = (
            f"llama.cpp gives this model full attention: beyond {config.sliding_window} tokens, "
            "where it was trained with a window, answers differ",
        )
    _write_rope(writer, config, label)
    return notes


def head_dim(config: Any) -> int:
    """The width of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _uses_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    in_use = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return bool(in_use and config.sliding_window < config.max_position_embeddings)


def _write_gemma(writer: Any, config: Any, label: str) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    # llama.cpp takes 1/sqrt(D), but for the 27B models 1/sqrt(hidden/heads).
    wide = config.hidden_size / config.num_attention_heads
    if config.query_pre_attn_scalar not in (head_dim(config), wide):
        raise _refusal(label, f"query_pre_attn_scalar {config.query_pre_attn_scalar}")
    period = 2 if config.model_type == "gemma2" else 6
    expected = [
        "full_attention" if (number + 1) % period == 0 else "sliding_attention"
        for number in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        raise _refusal(label, f"layers that are not windowed but for every {period}th")


def _rope(config: Any) -> dict[str, Any]:
    """The parameters of the rotary positions, of the layers with full attention if kinds differ."""
    values = dict(config.rope_parameters or {})
    own = values.get("full_attention")
    return dict(own) if isinstance(own, dict) else values


def _write_rope(writer: Any, config: Any, label: str) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    match rope.get("rope_type", "default"):
        case "default" | "llama3":  # of llama3, the file has a tensor of factors
            pass
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            original = rope.get("original_max_position_embeddings")
            writer.add_rope_scaling_orig_ctx_len(int(original or config.max_position_embeddings))
        case kind:
            raise _refusal(label, f"rotary positions of the type {kind}")
    local = (config.rope_parameters or {}).get("sliding_attention")
    if isinstance(local, dict):
        writer.add_rope_freq_base_swa(float(local.get("rope_theta", 10000.0)))


def rope_factors(config: Any) -> torch.Tensor | None:
    """Llama 3's divisors of the rotary frequencies, `[D / 2]`; None for other models.

    Long waves are stretched by `factor`, short ones are left, between them it is blended
    (the Llama 3.1 reference code's `apply_scaling`).
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    factors: list[float] = []
    for step in range(0, width, 2):
        wave = 2 * math.pi * float(rope["rope_theta"]) ** (step / width)
        if wave < old / high:
            factors.append(1.0)
        elif wave > old / low:
            factors.append(float(rope["factor"]))
        else:
            share = (old / wave - low) / (high - low)
            factors.append(1 / ((1 - share) / float(rope["factor"]) + share))
    return torch.tensor(factors)


def turned(name: str, weight: torch.Tensor, family: Family, config: Any) -> torch.Tensor:
    """A weight as llama.cpp wants it, by its name in transformers."""
    if family.adds_one and name.endswith("norm.weight"):
        return weight.float() + 1
    if not family.turns_heads:
        return weight
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in name:
            count = int(getattr(config, heads))
            # [heads, halves, D/2, ...] -> [heads, D/2, halves, ...]
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def _refusal(label: str, found: str) -> UserError:
    return UserError(
        "export.gguf-family", label, found=found, expected="a model that llama.cpp computes"
    )
