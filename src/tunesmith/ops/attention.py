"""Attention within each segment of a packed batch; no mask is ever built for it.

Shape letters: B=1, H query heads, K key/value heads, T tokens, L tokens of a segment, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from tunesmith.types import Segments


def attend(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment, in the form of transformers' attention registry.

    Returns:
        the output `[1, T, H, D]`, and None in place of attention weights.

    Raises:
        NotImplementedError: the model asks for attention sinks (`s_aux`), which no path covers.
    """
    if unused.get("s_aux") is not None:
        raise NotImplementedError("attention sinks (s_aux) are not covered by packed attention")
    window = sliding_window if sliding_window and sliding_window < segments.longest else None
    if softcap is None and dropout == 0.0 and _fits_varlen(query_1HTD, value_1KTD):
        out_THD = _attend_varlen(query_1HTD, key_1KTD, value_1KTD, segments, scaling, window)
        return out_THD.unsqueeze(0), None
    pieces: list[torch.Tensor] = []
    for start, count, length in segments.runs:
        stop = start + count * length
        # Neighbours of equal length are one batched call: a view, not a copy.
        q, k, v = (
            _as_batch(x[0, :, start:stop], count, length)
            for x in (query_1HTD, key_1KTD, value_1KTD)
        )
        o_nHLD = _attend_dense(
            q, k, v, scaling=scaling, dropout=dropout, window=window, softcap=softcap
        )
        pieces.append(o_nHLD.transpose(1, 2).reshape(count * length, *_out_shape(o_nHLD)))
    return torch.cat(pieces).unsqueeze(0), None


def attend_reference(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    segments: Segments,
    scaling: float,
) -> torch.Tensor:
    """The slow and obvious form of `attend`: one full matrix with a block mask. For tests."""
    num_tokens = query_1HTD.shape[2]
    segment_T = torch.repeat_interleave(
        torch.arange(len(segments.lengths)), torch.tensor(segments.lengths)
    )
    order_T = torch.arange(num_tokens)
    visible_TT = (segment_T[:, None] == segment_T[None, :]) & (order_T[:, None] >= order_T[None, :])
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    key_1HTD = key_1KTD.repeat_interleave(groups, dim=1)
    value_1HTD = value_1KTD.repeat_interleave(groups, dim=1)
    scores_1HTT = (query_1HTD @ key_1HTD.transpose(2, 3)) * scaling
    weights_1HTT = scores_1HTT.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    return (weights_1HTT @ value_1HTD).transpose(1, 2)


def _out_shape(out_nHLD: torch.Tensor) -> tuple[int, int]:
    # The value's head size may differ from the query's (DeepSeek's latent attention).
    return out_nHLD.shape[1], out_nHLD.shape[3]


def _fits_varlen(query_1HTD: torch.Tensor, value_1KTD: torch.Tensor) -> bool:
    """Whether torch's flash kernels take these: half precision, Ampere or newer, equal heads."""
    size = query_1HTD.shape[3]
    return (
        query_1HTD.is_cuda
        and value_1KTD.dtype in (torch.bfloat16, torch.float16)
        and size == value_1KTD.shape[3]
        and size <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query_1HTD.device) >= (8, 0)
    )


def _as_batch(x_HTD: torch.Tensor, count: int, length: int) -> torch.Tensor:
    heads, _, size = x_HTD.shape
    return x_HTD.reshape(heads, count, length, size).transpose(0, 1)


def _attend_varlen(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cumulative = segments.cumulative(query_1HTD.device)
    # Rotary tables in fp32 widen q and k under autocast, which does not know varlen_attn.
    query_1HTD, key_1KTD = query_1HTD.to(value_1KTD.dtype), key_1KTD.to(value_1KTD.dtype)
    # (w, 0): w tokens back and none ahead; -1 is "all", which makes it plain causal attention.
    reach = -1 if window is None else window - 1
    out = varlen_attn(
        query_1HTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTD[0].transpose(0, 1),
        cumulative,
        cumulative,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=(reach, 0),
        enable_gqa=query_1HTD.shape[1] != key_1KTD.shape[1],
    )
    if not isinstance(out, torch.Tensor):
        raise TypeError("varlen_attn returned auxiliary output that was not asked for")
    return out


def _attend_dense(
    q_nHLD: torch.Tensor,
    k_nKLD: torch.Tensor,
    v_nKLD: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = q_nHLD.shape[2]
    mask_LL = None if window is None else _band(length, window, q_nHLD.device)
    if softcap is None:
        return scaled_dot_product_attention(
            q_nHLD,
            k_nKLD,
            v_nKLD,
            attn_mask=mask_LL,
            dropout_p=dropout,
            is_causal=mask_LL is None,
            scale=scaling,
            enable_gqa=q_nHLD.shape[1] != k_nKLD.shape[1],
        )
    groups = q_nHLD.shape[1] // k_nKLD.shape[1]
    k_nHLD, v_nHLD = (x.repeat_interleave(groups, dim=1) for x in (k_nKLD, v_nKLD))
    scores = softcap * torch.tanh(q_nHLD @ k_nHLD.transpose(2, 3) * scaling / softcap)
    visible = _band(length, length if window is None else window, q_nHLD.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32)
    return torch.dropout(weights.to(q_nHLD.dtype), dropout, train=dropout > 0) @ v_nHLD


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    order_L = torch.arange(length, device=device)
    back_LL = order_L[:, None] - order_L[None, :]
    return (back_LL >= 0) & (back_LL < window)
