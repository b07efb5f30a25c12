"""Cross-entropy and log-probabilities under a linear head, without the full logits matrix.

The rows go through in chunks. A chunk's logits are made in one buffer that all chunks share, and
become the gradient in place, so a gradient needs no second look at them: a frozen head costs two
matrix products, a trained one three.

Shape letters: N supervised rows, H hidden size, V vocabulary, R rows of one chunk, B rows of one
block of it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tunesmith.ops.kernels import kernel

CHUNK_BYTES = 64 * 2**20
"""Logits of one chunk, in the dtype of the products. By bytes, never by a V/H ratio: torch's own
heuristic (2.13) took 3.9 s against 0.76 s on H=576, V=49152. Each chunk reads the whole head, so
the products want many rows: 1,500 rows in bfloat16 take 540 ms of one core with 16 MB, 470 with 32,
355 with 64, 360 with 96 (the products alone: 215), and 1,180 by way of `cross_entropy`."""

BLOCK_BYTES = 2**20
"""What a CPU works on in fp32 at a time. The elementwise passes want few rows, which stay in cache:
all of them together take 40 us a row on 1 MB, 51 on 2 MB, 73 on 4 MB (2 MB of L2)."""

PRODUCT_BYTES = 4 * 2**20
"""A part of the head's gradient in half precision, on its way into the sum in fp32."""


class _Form(NamedTuple):
    """How a hidden state becomes logits, and logits a loss."""

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_bytes: int = CHUNK_BYTES


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of `weight * cross-entropy`, with all gradients made in the forward.

    A row's logits are `y = cap(scale * (hidden @ weight.T + bias))`. Its loss is
    `(1 - s) * -logp[target] + s * mean(-logp) + z * logsumexp(y)^2`: label smoothing s as in
    `torch.nn.functional.cross_entropy`, and the z-loss of arXiv 2204.02311 §5.

    The backward only multiplies by the upstream scalar, in place: it can run once.

    Args:
        hidden_NH: the supervised rows only.
        weight_VH: the head; it may be tied to the embedding.
        target_N: token ids.
        weight_N: loss weight of each row; 0 makes it padding. It gets no gradient.
        bias_V: the head's bias.
        scale: multiplies the logits.
        softcap: caps them as `softcap * tanh(logits / softcap)` (Gemma 2).
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        z_loss: weight of the squared log of the softmax's normalizer.
        chunk_bytes: memory for the logits of one chunk.

    Returns:
        a scalar in fp32 (fp64 for fp64 input), and the rows' losses without weights, `loss_N`,
        which take no gradient.
    """
    form = _Form(scale, softcap, label_smoothing, z_loss, chunk_bytes)
    inputs = (_autocast(hidden_NH), weight_VH, bias_V)
    return _LinearCrossEntropy.apply(*inputs, target_N, weight_N, form, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def linear_logp(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Log-probability of each target, for losses that combine the rows of a sequence.

    With a frozen head the gradient of each row is made in the forward, up to the factor that the
    backward brings; a trained head makes its logits a second time in the backward.

    Returns:
        `logp_N` in fp32 (fp64 for fp64 input); the arguments are those of `linear_cross_entropy`.
    """
    form = _Form(scale, softcap, chunk_bytes=chunk_bytes)
    inputs = (_autocast(hidden_NH), weight_VH, bias_V)
    return _LinearLogp.apply(*inputs, target_N, form, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def row_losses(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Loss of each row from its logits: the slow and obvious form, which autograd differentiates.

    For tests, and for heads that are more than one matrix.
    """
    logits_NV = logits_NV.to(_wide(logits_NV.dtype)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    norm_N = logits_NV.logsumexp(-1)
    at_target_N = logits_NV.gather(1, target_N[:, None])[:, 0]
    expected_N = (1 - label_smoothing) * at_target_N + label_smoothing * logits_NV.mean(-1)
    return norm_N - expected_N + z_loss * norm_N.square()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        weight_N: torch.Tensor,
        form: _Form,
        with_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = tuple(with_grad and needed for needed in ctx.needs_input_grad[:3])
        head = _Head(weight_VH, bias_V, form)
        weight_N = weight_N.to(_wide(hidden_NH.dtype))
        loss_N, *grads = _losses_and_gradients(hidden_NH, head, target_N, weight_N, wanted=wanted)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(loss_N)
        return (weight_N * loss_N).sum(), loss_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a trained head's gradient is as large as the head. A second backward, which
        # would multiply twice, is refused by autograd's version check.
        made = (None if made is None else made.mul_(grads[0]) for made in ctx.saved_tensors)
        return (*made, *[None] * 4)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        form: _Form,
        with_grad: bool,
    ) -> torch.Tensor:
        is_frozen = not any(ctx.needs_input_grad[1:3])
        with_rows = with_grad and is_frozen and ctx.needs_input_grad[0]
        head, ones_N = _Head(weight_VH, bias_V, form), None
        loss_N, unit_NH, _, _ = _losses_and_gradients(
            hidden_NH, head, target_N, ones_N, wanted=(with_rows, False, False)
        )
        ctx.form, ctx.is_frozen = form, is_frozen
        if is_frozen:
            ctx.save_for_backward(unit_NH)
        else:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N)
        return loss_N.neg_()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_N,) = grads
        if ctx.is_frozen:
            (unit_NH,) = ctx.saved_tensors
            return ((unit_NH * -grad_N[:, None]).to(unit_NH.dtype), *[None] * 5)
        hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        head = _Head(weight_VH, bias_V, ctx.form)
        _, *made = _losses_and_gradients(
            hidden_NH, head, target_N, -grad_N, wanted=ctx.needs_input_grad[:3]
        )
        return (*made, *[None] * 3)


@dataclass(frozen=True, slots=True)
class _Head:
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    form: _Form


Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _losses_and_gradients(
    hidden_NH: torch.Tensor,
    head: _Head,
    target_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    *,
    wanted: tuple[bool, ...],
) -> Gradients:
    """Loss of each row, and the wanted gradients of `(weight_N * loss_N).sum()`.

    A row's weight never touches its V logits: it multiplies the row of the hidden gradient, and the
    hidden state that goes into the head's gradient.
    """
    wants_hidden, wants_weight, wants_bias = wanted
    wide = _wide(hidden_NH.dtype)
    weight_VH = head.weight_VH.to(hidden_NH.dtype)
    loss_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=wide)
    dhidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
    dweight_VH = _Sum(head.weight_VH) if wants_weight else None
    dbias_V = None
    if wants_bias and head.bias_V is not None:
        dbias_V = torch.zeros_like(head.bias_V, dtype=wide)
    for part, slope_RV in _chunks(hidden_NH, weight_VH, head, target_N, loss_N, any(wanted)):
        weight_R1 = None if weight_N is None else weight_N[part, None]
        if dhidden_NH is not None:
            torch.mm(slope_RV, weight_VH, out=dhidden_NH[part])
        if dweight_VH is not None:
            dweight_VH.add_product(slope_RV, _weighted(hidden_NH[part], weight_R1))
        if dbias_V is not None:
            dbias_V += _weighted(slope_RV, weight_R1).sum(0, dtype=wide)
    if dhidden_NH is not None and weight_N is not None:
        dhidden_NH.mul_(weight_N[:, None])
    dweight = None if dweight_VH is None else dweight_VH.result()
    if dbias_V is not None and head.bias_V is not None:
        dbias_V = dbias_V.to(head.bias_V.dtype)
    return loss_N, dhidden_NH, dweight, dbias_V


def _chunks(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    head: _Head,
    target_N: torch.Tensor,
    loss_N: torch.Tensor,
    with_slope: bool,
) -> Generator[tuple[slice, torch.Tensor]]:
    """Fills `loss_N`; gives each chunk's rows and `d loss / d (hidden @ weight.T)`."""
    num_rows, size = hidden_NH.shape[0], weight_VH.shape[0]
    form = head.form
    most = max(1, form.chunk_bytes // (hidden_NH.element_size() * size))
    # Chunks of equal size: a small last one would read the whole head for a few rows.
    rows = max(1, -(-num_rows // max(1, -(-num_rows // most))))
    # Elsewhere a chunk is one block: what counts there is how many kernels are started.
    block = max(1, BLOCK_BYTES // (4 * size)) if hidden_NH.device.type == "cpu" else rows
    buffer_RV = hidden_NH.new_empty(min(rows, num_rows), size)
    bias_V = None if head.bias_V is None else head.bias_V.to(loss_N.dtype)
    for start in range(0, num_rows, rows):
        part = slice(start, min(start + rows, num_rows))
        logits_RV = buffer_RV[: part.stop - start]
        torch.mm(hidden_NH[part], weight_VH.T, out=logits_RV)
        for first in range(start, part.stop, block):
            rows_B = slice(first, min(first + block, part.stop))
            logits_BV = logits_RV[first - start : rows_B.stop - start]
            loss_N[rows_B] = _loss_and_slope(
                logits_BV, target_N[rows_B, None], bias_V, form, with_slope
            )
        yield part, logits_RV


@kernel
def _loss_and_slope(
    logits_BV: torch.Tensor,
    target_B1: torch.Tensor,
    bias_V: torch.Tensor | None,
    form: _Form,
    with_slope: bool,
) -> torch.Tensor:
    """Loss of each row; its derivative takes the place of the logits."""
    scale, softcap, smoothing, z_loss, _ = form
    # For fp32 the same memory, worked on in place.
    y_BV = logits_BV.to(_wide(logits_BV.dtype))
    if bias_V is not None:
        y_BV.add_(bias_V)
    if scale != 1.0:
        y_BV.mul_(scale)
    bend_BV = None
    if softcap is not None:
        y_BV.div_(softcap).tanh_()
        bend_BV = 1 - y_BV * y_BV
        y_BV.mul_(softcap)
    expected_B1 = y_BV.gather(1, target_B1)
    if smoothing:
        expected_B1 = (1 - smoothing) * expected_B1 + smoothing * y_BV.mean(1, keepdim=True)
    top_B1 = y_BV.amax(1, keepdim=True)
    total_B1 = y_BV.sub_(top_B1).exp_().sum(1, keepdim=True)
    norm_B1 = top_B1 + total_B1.log()
    loss_B1 = norm_B1 - expected_B1 + z_loss * norm_B1 * norm_B1
    if with_slope:
        y_BV.mul_((1 + 2 * z_loss * norm_B1) / total_B1)
        if smoothing:
            y_BV.sub_(smoothing / y_BV.shape[1])
        y_BV.scatter_add_(1, target_B1, torch.full_like(norm_B1, smoothing - 1))
        if bend_BV is not None:
            y_BV.mul_(bend_BV)
        if scale != 1.0:
            y_BV.mul_(scale)
        if y_BV.dtype != logits_BV.dtype:
            logits_BV.copy_(y_BV)
    return loss_B1[:, 0]


class _Sum:
    """The head's gradient: a sum of products over chunks, in fp32."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        self.dtype = weight_VH.dtype
        self.sum_VH = torch.empty_like(weight_VH, dtype=_wide(weight_VH.dtype))
        self.is_empty = True

    def add_product(self, slope_RV: torch.Tensor, hidden_RH: torch.Tensor) -> None:
        """Adds `slope_RV.T @ hidden_RH`."""
        if slope_RV.dtype == self.sum_VH.dtype:
            beta = 0 if self.is_empty else 1
            torch.addmm(self.sum_VH, slope_RV.T, hidden_RH, beta=beta, out=self.sum_VH)
        else:
            # A part of the vocabulary at a time: the product is in bfloat16, beside the sum.
            step = max(1, PRODUCT_BYTES // (hidden_RH.shape[1] * hidden_RH.element_size()))
            for first in range(0, self.sum_VH.shape[0], step):
                product = slope_RV[:, first : first + step].T @ hidden_RH
                rows = self.sum_VH[first : first + step]
                rows.copy_(product) if self.is_empty else rows.add_(product)
        self.is_empty = False

    def result(self) -> torch.Tensor:
        """The sum in the head's dtype; zeros if there were no rows."""
        return (self.sum_VH.zero_() if self.is_empty else self.sum_VH).to(self.dtype)


def _weighted(rows_RX: torch.Tensor, weight_R1: torch.Tensor | None) -> torch.Tensor:
    """Rows times their weights, rounded once."""
    return rows_RX if weight_R1 is None else (rows_RX * weight_R1).to(rows_RX.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast(hidden_NH: torch.Tensor) -> torch.Tensor:
    kind = hidden_NH.device.type
    is_on = torch.is_autocast_enabled(kind) and hidden_NH.dtype != torch.float64
    return hidden_NH.to(torch.get_autocast_dtype(kind)) if is_on else hidden_NH
