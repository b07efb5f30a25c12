"""Attention within each segment of a packed batch; no mask of the whole batch is ever built.

Where torch has its varlen kernels they are used, elsewhere see `ops.products`.

Shape letters: B=1, T tokens, H query heads, K key/value heads, G = H / K, D head size, L tokens of
a segment, S tokens it sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.function import once_differentiable

from tunesmith.ops.kept import Kept
from tunesmith.ops.products import attend_by_products

if TYPE_CHECKING:
    from tunesmith.types import Segments

MOST_VARLEN_NUMBERS = 2**31
"""Flash attention's backward counts (rows + 128 * segments) * heads * head size in int32."""


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
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1KTD, value_1KTD))
    window = sliding_window or None
    if softcap is None and dropout == 0.0:
        out_THD = attend_packed(q_THD, k_TKD, v_TKD, segments, scaling=scaling, window=window)
    else:
        out_THD = _attend_plainly(
            q_THD, k_TKD, v_TKD, segments,
            scaling=scaling, dropout=dropout, window=window, softcap=softcap,
        )  # fmt: skip
    return out_THD.unsqueeze(0), None


def attend_packed(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """Causal attention of each token to its own segment and to the segment's ancestors.

    Args:
        query_THD: queries, `[T, H, D]`; the head size of values may differ from theirs.
        key_TKD: keys; each serves `H / K` neighboring query heads.
        value_TKD: values, whose type the output takes (under autocast, autocast's).
        segments: the segment table of the T tokens.
        scaling: factor on the scores.
        window: tokens that a token sees at most, itself included.
        kept: of the checkpointed part that this runs in: its second pass takes the output and what
            the backward needs besides from the first one. All kernels can do so.

    Returns:
        the output, contiguous, `[T, H, D of the values]`.
    """
    if window is not None and window >= segments.reach:
        window = None
    # Rotary tables in fp32 widen q and k under autocast, which does not know what follows.
    dtype = _working_dtype(value_TKD)
    q, k, v = (x.to(dtype) for x in (query_THD, key_TKD, value_TKD))
    if _fits_varlen(q, v):
        return _attend_varlen(q, k, v, segments, scaling=scaling, window=window, kept=kept)
    return attend_by_products(q, k, v, segments, scaling=scaling, window=window, kept=kept)


def attend_reference(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    segments: Segments,
    scaling: float,
    window: int | None = None,
) -> torch.Tensor:
    """The slow and obvious form of `attend`: one full matrix with a block mask. For tests."""
    numbers = range(len(segments.lengths))
    lengths = torch.tensor(segments.lengths)
    segment_T = torch.arange(len(lengths)).repeat_interleave(lengths)
    order_T = torch.arange(len(segment_T))
    starts = torch.tensor(segments.starts[:-1]) - torch.tensor(segments.offsets)
    position_T = order_T - starts[segment_T]
    is_before = torch.tensor([[b in segments.ancestors(a) for b in numbers] for a in numbers])
    is_same_TT = segment_T[:, None] == segment_T[None, :]
    back_TT = position_T[:, None] - position_T[None, :]
    visible_TT = is_same_TT & (back_TT >= 0) | is_before[segment_T][:, segment_T]
    visible_TT &= back_TT < (window or len(segment_T))
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    key_1HTD = key_1KTD.repeat_interleave(groups, dim=1)
    value_1HTD = value_1KTD.repeat_interleave(groups, dim=1)
    scores_1HTT = (query_1HTD @ key_1HTD.transpose(2, 3)) * scaling
    weights_1HTT = scores_1HTT.masked_fill(~visible_TT, float("-inf")).softmax(-1)
    return (weights_1HTT @ value_1HTD).transpose(1, 2)


def _working_dtype(value_TKD: torch.Tensor) -> torch.dtype:
    kind = value_TKD.device.type
    if torch.is_autocast_enabled(kind) and value_TKD.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return value_TKD.dtype


# CUDA


def _fits_varlen(q_THD: torch.Tensor, v_TKD: torch.Tensor) -> bool:
    """Whether torch's flash kernels take these: half precision, Ampere or newer, equal heads."""
    size = q_THD.shape[2]
    return (
        q_THD.is_cuda
        and v_TKD.dtype in (torch.bfloat16, torch.float16)
        and size == v_TKD.shape[2]
        and size <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(q_THD.device) >= (8, 0)
    )


def _attend_varlen(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None,
    kept: Kept | None,
) -> torch.Tensor:
    pieces: list[torch.Tensor] = []
    calls = varlen_calls(segments, q_THD.shape[1] * q_THD.shape[2], q_THD.device)
    for number, call in enumerate(calls):
        begin, end = call.rows
        q = q_THD[begin:end]
        k, v = (
            x[begin:end] if call.keys is None else x.index_select(0, call.keys)
            for x in (k_TKD, v_TKD)
        )
        if kept is None:
            pieces.append(_varlen(q, k, v, call, scaling, window))
        else:
            args = (q, k, v, call, scaling, window, kept, number)
            pieces.append(cast("torch.Tensor", KeptVarlen.apply(*args)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: VarlenCall,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        call.cumulative_rows,
        call.cumulative_keys,
        call.longest_rows,
        call.longest_keys,
        scale=scaling,
        # (w, 0): w tokens back and none ahead of the last key; -1 is all of them.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if not isinstance(out, torch.Tensor):
        raise TypeError("varlen_attn returned auxiliary output that was not asked for")
    return out


class KeptVarlen(torch.autograd.Function):
    """`varlen_attn` whose second pass takes what the first one found.

    The kernels are those that `varlen_attn` calls; it has no way in for a known output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_LHD: torch.Tensor,
        k_SKD: torch.Tensor,
        v_SKD: torch.Tensor,
        call: VarlenCall,
        scaling: float,
        window: int | None,
        kept: Kept,
        number: int,
    ) -> torch.Tensor:
        """Output `[L, H, D]` of the call's rows."""
        options = _flash_options(scaling, window)

        def compute() -> tuple[torch.Tensor, ...]:
            found = torch.ops.aten._flash_attention_forward(
                q_LHD, k_SKD, v_SKD, *_flash_table(call), 0.0, window is None, False, **options
            )
            return found[:4]  # output, logarithms of sums, and the state of random numbers, in two

        found = kept.once(number, compute)
        ctx.save_for_backward(q_LHD, k_SKD, v_SKD, *found)
        ctx.call, ctx.options, ctx.is_causal = call, options, window is None
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        *known, random_state, unused = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            grads[0], *known, *_flash_table(ctx.call), 0.0, ctx.is_causal, random_state, unused,
            **ctx.options,
        )  # fmt: skip
        return *found, None, None, None, None, None


def _flash_table(call: VarlenCall) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return call.cumulative_rows, call.cumulative_keys, call.longest_rows, call.longest_keys


def _flash_options(scaling: float, window: int | None) -> dict[str, Any]:
    left = -1 if window is None else window - 1
    return {"scale": scaling, "window_size_left": left, "window_size_right": 0}


@dataclass(frozen=True)
class VarlenCall:
    """One call of varlen attention: some segments' rows, and for each the keys it sees."""

    rows: tuple[int, int]
    keys: torch.Tensor | None  # None: the same tokens as the rows
    cumulative_rows: torch.Tensor
    cumulative_keys: torch.Tensor
    longest_rows: int
    longest_keys: int


def varlen_calls(segments: Segments, row_size: int, device: torch.device) -> list[VarlenCall]:
    """The calls for a batch, made once per device; several only where int32 would overflow."""
    key = ("varlen", row_size, device)
    if key not in segments.memo:
        segments.memo[key] = [
            _varlen_call(segments, first, last, device)
            for first, last in _within_int32(segments, row_size)
        ]
    return cast("list[VarlenCall]", segments.memo[key])


def _within_int32(segments: Segments, row_size: int) -> Iterator[tuple[int, int]]:
    first, numbers = 0, 0
    for segment, (offset, length) in enumerate(
        zip(segments.offsets, segments.lengths, strict=True)
    ):
        more = (offset + length + 128) * row_size
        if segment > first and numbers + more >= MOST_VARLEN_NUMBERS:
            yield first, segment
            first, numbers = segment, 0
        numbers += more
    yield first, len(segments.lengths)


def _varlen_call(segments: Segments, first: int, last: int, device: torch.device) -> VarlenCall:
    starts = segments.starts
    sees = [
        [(starts[one], starts[one + 1]) for one in (*segments.ancestors(segment), segment)]
        for segment in range(first, last)
    ]
    num_keys = [sum(stop - start for start, stop in ranges) for ranges in sees]
    keys = torch.cat([torch.arange(*r) for ranges in sees for r in ranges])
    lengths = segments.lengths[first:last]
    cumulative_rows, cumulative_keys = (
        _sent(torch.tensor((0, *accumulate(counts)), dtype=torch.int32), device)
        for counts in (lengths, num_keys)
    )
    return VarlenCall(
        rows=(starts[first], starts[last]),
        keys=_sent(keys, device) if num_keys != list(lengths) else None,
        cumulative_rows=cumulative_rows,
        cumulative_keys=cumulative_keys,
        longest_rows=max(lengths),
        longest_keys=max(num_keys),
    )


def _sent(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table on the device; a copy from pageable memory would wait for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


# Soft caps and dropout


def _attend_plainly(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    segments: Segments,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One segment after another, by autograd."""
    pieces: list[torch.Tensor] = []
    starts = segments.starts
    for segment in range(len(segments.lengths)):
        ranges = [(starts[one], starts[one + 1]) for one in segments.ancestors(segment)]
        begin, end = starts[segment], starts[segment + 1]
        ranges.append((begin, end))
        k_KSD, v_KSD = (
            torch.cat([x[start:stop] for start, stop in ranges]).transpose(0, 1)
            for x in (k_TKD, v_TKD)
        )
        out_HLD = _attend_dense(
            q_THD[begin:end].transpose(0, 1), k_KSD, v_KSD,
            scaling=scaling, dropout=dropout, window=window, softcap=softcap,
        )  # fmt: skip
        pieces.append(out_HLD.transpose(0, 1))
    return torch.cat(pieces)


def _attend_dense(
    q_HLD: torch.Tensor,
    k_KSD: torch.Tensor,
    v_KSD: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    num_rows, num_keys = q_HLD.shape[1], k_KSD.shape[1]
    groups = q_HLD.shape[0] // k_KSD.shape[0]
    k_HSD, v_HSD = (x.repeat_interleave(groups, dim=0) for x in (k_KSD, v_KSD))
    scores_HLS = q_HLD @ k_HSD.transpose(1, 2) * scaling
    if softcap is not None:
        scores_HLS = softcap * torch.tanh(scores_HLS / softcap)
    row_L1 = torch.arange(num_keys - num_rows, num_keys, device=q_HLD.device)[:, None]
    back_LS = row_L1 - torch.arange(num_keys, device=q_HLD.device)
    visible = (back_LS >= 0) & (back_LS < (window or num_keys))
    weights = scores_HLS.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32)
    return torch.dropout(weights.to(v_HSD.dtype), dropout, train=dropout > 0) @ v_HSD
