"""Packed attention of a processor: torch's flash kernel, or plain products over tiles.

Milliseconds of one busy core's time with AMX, forward + backward (9 query and 3 key/value heads of
64; flash called segment by segment on views):

    lengths                  bfloat16: flash    tiles      float32: flash    tiles
    310, 250, ... 90, 60         6 + 54         9 + 20         13 + 33       14 + 35
    8 of 150                     5 + 45         6 + 14          8 + 19       12 + 29
    16 of 64                     2 + 30         3 + 8           5 + 11        5 + 14
    30 of 12 to 51               4 + 45         5 + 12          6 + 11        6 + 17
    1,000                        9 + 45        17 + 40         21 + 52       35 + 98
    2,048                       22 + 115       64 + 150        63 + 150     108 + 302

So flash is taken for everything but its backward pass in half precision, and that for long
segments too. Windows, which it would need a mask for, go by tiles, and so do shared prefixes in
half precision, where joining the parts of a path would round each.

Shape letters: T tokens, H query heads, K key/value heads, G = H / K, D head size, P tokens of a
path; of a stack of tiles: n tiles, L query rows, S key rows; R rows of one head and token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from tunesmith.ops.kept import Kept, Results, compute_once
from tunesmith.ops.tiles import BLOCK, STEP, Stack, TileTable, tile_table
from tunesmith.types import Segments

Run = tuple[int, int, int]
"""First row, number of equal pieces, rows of each."""

HALF = (torch.bfloat16, torch.float16)

LONG = 1024
"""Root mean square of lengths from which flash's backward pass is faster in half precision."""


def attend_by_products(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None,
    kept: Kept | None = None,
) -> torch.Tensor:
    """`attend_packed` on devices without varlen kernels."""
    is_equal = q_THD.shape[2] == v_TKD.shape[2]
    has_flash = q_THD.device.type == "cpu" and is_equal
    # In half precision, joining parts of a path would round each.
    is_plain = not segments.parents or q_THD.dtype not in HALF
    takes_flash = has_flash and window is None and is_plain
    function = FlashAttention if takes_flash else TileAttention
    out: torch.Tensor = function.apply(q_THD, k_TKD, v_TKD, segments, scaling, window, kept)
    return out


# Flash


class FlashAttention(torch.autograd.Function):
    """torch's flash kernel on views of the rows, one `_Part` of the attention after another."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        segments: Segments,
        scaling: float,
        window: None,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Output `[T, H, D]`."""
        is_by_tiles = q_THD.dtype in HALF and not _is_long(segments)

        def compute() -> Results:
            found = _flash(q_THD, k_TKD, v_TKD, segments, scaling)
            return found[:1] if is_by_tiles else found

        found = compute_once(kept, 0, compute)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, *(() if is_by_tiles else found))
        ctx.segments, ctx.scaling, ctx.is_by_tiles = segments, scaling, is_by_tiles
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients by the kernel's own backward pass, or by tiles where that is faster."""
        q_THD, k_TKD, v_TKD, *kept = ctx.saved_tensors
        if ctx.is_by_tiles:
            table = _table(ctx.segments, q_THD, k_TKD)
            found = _tile_gradients(grads[0], q_THD, k_TKD, v_TKD, table, ctx.scaling)
            return *found, None, None, None, None
        out_THD, logsum_TH1 = kept
        found = tuple(torch.empty_like(x) for x in (q_THD, k_TKD, v_TKD))
        for part in _parts(ctx.segments):
            do, q, out, logsum = (
                _as_heads(x, part.rows) for x in (grads[0], q_THD, out_THD, logsum_TH1)
            )
            k, v = (_as_heads(x, part.keys) for x in (k_TKD, v_TKD))
            more = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, out, logsum[..., 0].contiguous(), 0.0, part.is_own, scale=ctx.scaling
            )
            for whole, runs, one in zip(
                found, (part.rows, part.keys, part.keys), more, strict=True
            ):
                target = _as_heads(whole, runs)
                target.copy_(one) if part.is_own else target.add_(one)
        return *found, None, None, None, None


def _flash(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    segments: Segments,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithms of the sums of exponentials, `[T, H, D]` and `[T, H, 1]`."""
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    dtype = torch.float32 if q_THD.dtype in HALF else q_THD.dtype
    logsum_TH1 = q_THD.new_empty(*q_THD.shape[:2], 1, dtype=dtype)
    for part in _parts(segments):
        found, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _as_heads(q_THD, part.rows),
            *(_as_heads(x, part.keys) for x in (k_TKD, v_TKD)),
            0.0,
            part.is_own,
            scale=scaling,
        )
        out, total = (_as_heads(x, part.rows) for x in (out_THD, logsum_TH1))
        if part.is_own:
            out.copy_(found)
            total.copy_(logsum[..., None])
        else:
            _add_to(out, total, found, logsum[..., None])
    return out_THD, logsum_TH1


@dataclass(frozen=True)
class _Part:
    """Rows and the keys they see: causally in their own segments, wholly in a shared prefix."""

    rows: Run
    keys: Run
    is_own: bool


def _parts(segments: Segments) -> list[_Part]:
    """All of a batch's attention; the own parts come first and reach every row."""
    if "flash" not in segments.memo:
        parts = [_Part(run, run, is_own=True) for run in segments.runs]
        starts, numbers = segments.starts, range(len(segments.lengths))
        for ancestors, members in groupby(numbers, key=segments.ancestors):
            siblings = list(members)
            rows = _run(starts[siblings[0]], starts[siblings[-1] + 1])
            parts += [
                _Part(rows, _run(starts[one], starts[one + 1]), is_own=False) for one in ancestors
            ]
        segments.memo["flash"] = parts
    return cast("list[_Part]", segments.memo["flash"])


def _run(start: int, stop: int) -> Run:
    return start, 1, stop - start


def _add_to(
    out: torch.Tensor, total: torch.Tensor, more: torch.Tensor, logsum: torch.Tensor
) -> None:
    """Joins the attention to more keys with that to earlier ones, each `[n, H, L, D or 1]`.

    Both outputs are means with weights that sum to the exponential of their `total` or `logsum`.
    """
    joined = torch.logaddexp(total, logsum)
    out.mul_((total - joined).exp()).add_(more * (logsum - joined).exp())
    total.copy_(joined)


def _is_long(segments: Segments) -> bool:
    squares = sum(length * length for length in segments.lengths)
    return squares >= LONG * LONG * len(segments.lengths)


def _as_heads(x_THD: torch.Tensor, run: Run) -> torch.Tensor:
    """Rows as a view `[n, H, L, D]`."""
    start, count, length = run
    return x_THD[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


# Tiles


class TileAttention(torch.autograd.Function):
    """Scores, softmax and output of one stack of tiles after another (see `ops.tiles`)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        segments: Segments,
        scaling: float,
        window: int | None,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Output `[T, H, D of the values]`."""
        table = _table(segments, q_THD, k_TKD, window)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD)
        ctx.table, ctx.scaling = table, scaling
        (out_THD,) = compute_once(kept, 0, lambda: (_tiles(q_THD, k_TKD, v_TKD, table, scaling),))
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        q_THD, k_TKD, v_TKD = ctx.saved_tensors
        found = _tile_gradients(grads[0], q_THD, k_TKD, v_TKD, ctx.table, ctx.scaling)
        return *found, None, None, None, None


def _table(
    segments: Segments, q_THD: torch.Tensor, k_TKD: torch.Tensor, window: int | None = None
) -> TileTable:
    return tile_table(segments, window, (q_THD.shape[1], k_TKD.shape[1]), q_THD.device)


def _tiles(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    table: TileTable,
    scaling: float,
) -> torch.Tensor:
    q_RD, k_RD, v_RD = table.rows_of(q_THD), table.keys_of(k_TKD), table.keys_of(v_TKD)
    out_RD = q_RD.new_empty(len(q_RD), v_RD.shape[1])
    parts = zip(
        _masks(table, q_RD),
        *(table.split_queries(x) for x in (q_RD, out_RD)),
        *(table.split_keys(x) for x in (k_RD, v_RD)),
        strict=True,
    )
    with torch.autocast(q_RD.device.type, enabled=False):
        for mask, q, out, k, v in parts:
            torch.bmm(_probabilities(mask, q, k, scaling), v, out=out)
    return out_RD.index_select(0, table.query_places).view(*q_THD.shape[:2], -1)


def _tile_gradients(
    grad_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    table: TileTable,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values.

    The probabilities are computed anew: nothing of size `T * T` is kept from the forward pass.
    Scale and mask ride in the product of the scores, and softmax and its gradient are one pass
    each, in fp32 inside for half precision.
    """
    q_RD, k_RD, v_RD = table.rows_of(q_THD), table.keys_of(k_TKD), table.keys_of(v_TKD)
    do_RD = table.rows_of(grad_THD)
    _clear_padding(do_RD, table)
    dq_RD, dk_RD, dv_RD = (torch.empty_like(x) for x in (q_RD, k_RD, v_RD))
    parts = zip(
        _masks(table, q_RD),
        *(table.split_queries(x) for x in (q_RD, do_RD, dq_RD)),
        *(table.split_keys(x) for x in (k_RD, v_RD, dk_RD, dv_RD)),
        strict=True,
    )
    with torch.autocast(q_RD.device.type, enabled=False):
        for mask, q, do, dq, k, v, dk, dv in parts:
            probs = _probabilities(mask, q, k, scaling)
            torch.bmm(probs.transpose(1, 2), do, out=dv)
            dprobs = torch.bmm(do, v.transpose(1, 2))
            # torch's own gradient of softmax: one pass, where plain operations take three.
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            torch.baddbmm(dq, dscores, k, beta=0, alpha=scaling, out=dq)
            torch.baddbmm(dk, dscores.transpose(1, 2), q, beta=0, alpha=scaling, out=dk)
    dq_THD = dq_RD.index_select(0, table.query_places).view_as(q_THD)
    dk_TKD, dv_TKD = _gather_keys(dk_RD, k_TKD, table), _gather_keys(dv_RD, v_TKD, table)
    return dq_THD, dk_TKD, dv_TKD


def _clear_padding(do_RD: torch.Tensor, table: TileTable) -> None:
    """Padded rows hold copies of real ones; without a gradient they give none to anything."""
    for stack, part in zip(table.stacks, table.split_queries(do_RD), strict=True):
        do_nKLGD = part.view(len(stack.tiles), table.num_kv, stack.num_rows, table.groups, -1)
        # Slices: index_fill_ takes a microsecond for every row.
        for tile, do_KLGD in zip(stack.tiles, do_nKLGD, strict=True):
            if tile.length < stack.num_rows:
                do_KLGD[:, tile.length :].zero_()


def _probabilities(
    mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scaling: float
) -> torch.Tensor:
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling).softmax(-1)


def _gather_keys(grad_RD: torch.Tensor, x_TKD: torch.Tensor, table: TileTable) -> torch.Tensor:
    """The gradient of keys or values: that of each tile's own rows, plus those of paths."""
    grad_TKD = grad_RD.index_select(0, table.key_places).view_as(x_TKD)
    if table.most_before == 0:
        return grad_TKD
    # Many children add to a shared prefix: in half precision the sum is taken in fp32.
    if grad_TKD.dtype in HALF:
        grad_TKD = grad_TKD.float()
    for stack, part in zip(table.stacks, table.split_keys(grad_RD), strict=True):
        grad_nKSD = part.view(len(stack.tiles), table.num_kv, *part.shape[1:])
        for first, last, path in stack.shared_paths() if stack.num_before else []:
            grad_KPD = grad_nKSD[first:last, :, : stack.num_before].sum(0, dtype=grad_TKD.dtype)
            place = 0
            for begin, end in path:
                grad_TKD[begin:end] += grad_KPD[:, place : place + end - begin].transpose(0, 1)
                place += end - begin
    return grad_TKD.to(x_TKD.dtype)


def _masks(table: TileTable, q_RD: torch.Tensor) -> list[torch.Tensor]:
    """What is added to each stack's scores, `[L * G, S]`."""
    return [_mask(table, stack, q_RD) for stack in table.stacks]


def _mask(table: TileTable, stack: Stack, q_RD: torch.Tensor) -> torch.Tensor:
    # Round sizes, so that few bands are made.
    most = max(BLOCK, 1 << table.most_before.bit_length())
    num_rows = max(BLOCK, stack.num_rows)
    band = _band(num_rows, most, table.groups, table.window, q_RD.dtype, q_RD.device)
    left = most - stack.num_before
    return band[: stack.num_rows * table.groups, left : left + stack.num_keys]


@lru_cache(maxsize=8)
def _band(
    num_rows: int,
    most: int,
    groups: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Zeros where row `i` sees column `j`, -inf elsewhere; column `most` is row 0 itself.

    A tile's mask depends only on how far back a key lies, so all of them are pieces of this one.
    """
    row_R1 = torch.arange(num_rows, device=device).repeat_interleave(groups)[:, None]
    back_RS = row_R1 + most - torch.arange(most + num_rows + STEP, device=device)
    hidden = back_RS < 0 if window is None else (back_RS < 0) | (back_RS >= window)
    zeros = torch.zeros(back_RS.shape, dtype=dtype, device=device)
    return zeros.masked_fill(hidden, float("-inf"))
