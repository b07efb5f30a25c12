"""How far a linear head's distributions are from a teacher's, without the full logits of either.

As in `linear_logp`, rows go through in chunks and a chunk's gradient is made in the forward, so the
logits of both models are there for one chunk at a time and are computed once.

Shape letters: N supervised rows, H hidden size, V vocabulary of the student's head, C the part of
it that both heads have, R rows of one chunk, B rows of one block of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

CHUNK_BYTES = 32 * 2**20
"""Logits of one chunk, of each of the two models."""

BLOCK_BYTES = {"cpu": 2**20}
"""Of one of the buffers that a block works with, in fp32; a processor's should stay in cache."""
OTHER_BLOCK_BYTES = 32 * 2**20

NUM_BUFFERS = 8
"""That a block works with."""

PRODUCT_BYTES = 4 * 2**20
"""A part of the head's gradient in half precision, on its way into the sum in fp32."""

DivergenceKind = Literal["forward", "reverse", "jsd"]


class Blend(NamedTuple):
    """What a row costs: `(1 - sft_weight) * divergence + sft_weight * cross-entropy`.

    Args:
        kind: forward is KL(teacher || student), reverse KL(student || teacher), jsd eq. 1 of arXiv
            2306.13649.
        teacher_share: of the mixture of jsd, its beta.
        temperature: divides the logits of both, for the divergence alone.
        sft_weight: of the plain loss on the targets.
    """

    kind: DivergenceKind = "forward"
    teacher_share: float = 0.5
    temperature: float = 1.0
    sft_weight: float = 0.0


class Found(NamedTuple):
    """Sums over rows, each times its weight, in fp32 (fp64 for fp64 input).

    Args:
        loss_sum: with gradients; they run back once.
        kl_sum: KL(teacher || student) at the temperature, whatever the divergence.
        agreement_sum: 1 for a row where both find the same token likeliest.
    """

    loss_sum: torch.Tensor
    kl_sum: torch.Tensor
    agreement_sum: torch.Tensor


class _Student(NamedTuple):
    """A head without its weight, and how its logits become the model's."""

    size: int
    scale: float
    softcap: float | None
    chunk_bytes: int


Teacher = Callable[[slice], torch.Tensor]
"""The teacher's logits of some rows, scaled and capped: `logits_RC`."""


def block_bytes(device_kind: str) -> int:
    """Memory of one of a block's buffers."""
    return BLOCK_BYTES.get(device_kind, OTHER_BLOCK_BYTES)


def linear_divergence(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor,
    teacher: Teacher,
    *,
    blend: Blend,
    size: int,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Found:
    """Sums over rows of `weight * loss`, with all gradients made in the forward.

    Args:
        hidden_NH: the student's, of the supervised rows only.
        weight_VH: the student's head; it may be tied to the embedding.
        target_N: token ids below `size`.
        weight_N: of each row; it gets no gradient.
        teacher: called once for each chunk, in order, without gradients.
        blend: the loss.
        size: of the vocabulary that both heads have; what one has beyond it is as if not there.
        bias_V: the student's head's bias.
        scale: multiplies the student's logits.
        softcap: caps them as `softcap * tanh(logits / softcap)`.
        chunk_bytes: memory for the logits of one chunk.
    """
    student = _Student(size, scale, softcap, chunk_bytes)
    inputs = (_autocast(hidden_NH), weight_VH, bias_V)
    about = (target_N, weight_N, teacher, blend, student)
    return Found(*_LinearDivergence.apply(*inputs, *about, torch.is_grad_enabled()))  # pyright: ignore


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        weight_N: torch.Tensor,
        teacher: Teacher,
        blend: Blend,
        student: _Student,
        with_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(with_grad and needed for needed in ctx.needs_input_grad[:3])
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        weight_N = weight_N.to(wide)
        gradients = _Gradients(hidden_NH, weight_VH, bias_V, weight_N, wanted)
        head_CH = weight_VH[: student.size].to(hidden_NH.dtype)
        bias_C = None if bias_V is None else bias_V[: student.size].to(wide)
        sums_3 = hidden_NH.new_zeros(3, dtype=wide)
        for part in _chunks(hidden_NH, student):
            logits_RC = hidden_NH[part] @ head_CH.T
            teacher_RC = teacher(part)
            block = _block_rows(logits_RC)
            for first in range(0, len(logits_RC), block):
                rows = slice(first, first + block)
                found_3B, slope_BC = _found_and_slope(
                    _shaped(logits_RC[rows].to(wide), bias_C, student),
                    teacher_RC[rows].to(wide),
                    target_N[part][rows, None],
                    blend,
                    any(wanted),
                )
                # No matrix product: autocast would round it.
                sums_3 += (found_3B * weight_N[part][rows]).sum(-1)
                if slope_BC is not None:
                    bent_BC = _unshaped(slope_BC, logits_RC[rows].to(wide), bias_C, student)
                    logits_RC[rows] = bent_BC.to(logits_RC.dtype)
            if any(wanted):
                gradients.add(part, logits_RC, head_CH)
        ctx.save_for_backward(*gradients.results())
        loss, kl, agreement = sums_3.unbind()
        results = (loss.clone(), kl.clone(), agreement.clone())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, as in `linear_cross_entropy`: a second backward is refused by autograd.
        made = (None if made is None else made.mul_(grads[0]) for made in ctx.saved_tensors)
        return (*made, *[None] * 6)


class _Gradients:
    """Of hidden states, head and bias, growing chunk by chunk; the head's sum is in fp32."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        weight_N: torch.Tensor,
        wanted: tuple[bool, ...],
    ) -> None:
        wide = weight_N.dtype
        self.hidden_NH, self.weight_N = hidden_NH, weight_N
        self.weight_VH, self.bias_V = weight_VH, bias_V
        self.of_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
        self.of_weight = torch.zeros_like(weight_VH, dtype=wide) if wanted[1] else None
        self.of_bias = None
        if wanted[2] and bias_V is not None:
            self.of_bias = torch.zeros_like(bias_V, dtype=wide)

    def add(self, part: slice, slope_RC: torch.Tensor, head_CH: torch.Tensor) -> None:
        """Takes a chunk's `d loss / d (hidden @ weight.T)`, not yet times the rows' weights."""
        weight_R1, hidden_RH = self.weight_N[part, None], self.hidden_NH[part]
        size = slope_RC.shape[1]
        if self.of_hidden is not None:
            self.of_hidden[part] = ((slope_RC @ head_CH) * weight_R1).to(hidden_RH.dtype)
        if self.of_weight is not None:
            weighted_RH = (hidden_RH * weight_R1).to(hidden_RH.dtype)
            # A part of the vocabulary at a time: the product may be in bfloat16, beside the sum.
            step = max(1, PRODUCT_BYTES // (hidden_RH.shape[1] * hidden_RH.element_size()))
            for first in range(0, size, step):
                columns = slice(first, min(first + step, size))
                self.of_weight[columns] += slope_RC[:, columns].T @ weighted_RH
        if self.of_bias is not None:
            self.of_bias[:size] += (slope_RC * weight_R1).sum(0)

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """The three gradients in the dtypes of what they are of; None where none is wanted."""
        of_weight, of_bias = self.of_weight, self.of_bias
        if of_weight is not None:
            of_weight = of_weight.to(self.weight_VH.dtype)
        if of_bias is not None and self.bias_V is not None:
            of_bias = of_bias.to(self.bias_V.dtype)
        return self.of_hidden, of_weight, of_bias


def _found_and_slope(
    student_BC: torch.Tensor,
    teacher_BC: torch.Tensor,
    target_B1: torch.Tensor,
    blend: Blend,
    with_slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss, KL and agreement of each row, `found_3B`; the derivative of the loss by its logits."""
    plain_BC = of_student_BC = torch.log_softmax(student_BC, -1)
    of_teacher_BC = torch.log_softmax(_cooled(teacher_BC, blend), -1)
    if blend.temperature != 1.0:
        of_student_BC = torch.log_softmax(_cooled(student_BC, blend), -1)
    p_teacher_BC, p_student_BC = of_teacher_BC.exp(), of_student_BC.exp()
    kl_B = (of_teacher_BC - of_student_BC).mul_(p_teacher_BC).sum(-1)
    if blend.kind == "forward":
        loss_B, slope_BC = kl_B, p_student_BC.sub_(p_teacher_BC)
    elif blend.kind == "reverse":
        ratio_BC = of_student_BC - of_teacher_BC
        loss_B = (p_student_BC * ratio_BC).sum(-1)
        slope_BC = p_student_BC.mul_(ratio_BC.sub_(loss_B[:, None]))
    else:
        share = blend.teacher_share
        mixture_BC = (p_student_BC * (1 - share)).add_(p_teacher_BC, alpha=share)
        # Where both are too small for the dtype, any finite logarithm will do: it is times 0.
        of_mixture_BC = mixture_BC.clamp_(min=torch.finfo(mixture_BC.dtype).tiny).log_()
        to_teacher_B = p_teacher_BC.mul_(of_teacher_BC.sub_(of_mixture_BC)).sum(-1)
        ratio_BC = of_student_BC - of_mixture_BC
        to_student_B = (p_student_BC * ratio_BC).sum(-1)
        loss_B = share * to_teacher_B + (1 - share) * to_student_B
        # What the mixture's own change adds cancels out.
        slope_BC = p_student_BC.mul_(ratio_BC.sub_(to_student_B[:, None])).mul_(1 - share)
    if blend.temperature != 1.0:
        slope_BC.div_(blend.temperature)
    if blend.sft_weight:
        share = blend.sft_weight
        loss_B = (1 - share) * loss_B - share * plain_BC.gather(1, target_B1)[:, 0]
        slope_BC.mul_(1 - share).add_(plain_BC.exp(), alpha=share)
        slope_BC.scatter_add_(1, target_B1, loss_B.new_full(target_B1.shape, -share))
    agreement_B = _agreement(student_BC, teacher_BC).to(loss_B.dtype)
    return torch.stack((loss_B, kl_B, agreement_B)), slope_BC if with_slope else None


def _cooled(logits_BC: torch.Tensor, blend: Blend) -> torch.Tensor:
    return logits_BC if blend.temperature == 1.0 else logits_BC / blend.temperature


def _agreement(left_BC: torch.Tensor, right_BC: torch.Tensor) -> torch.Tensor:
    """Which rows have their largest number in the same place, but for near ties.

    Only there a sum reaches that of both maxima. A row of 49,152 takes 0.05 ms, two argmaxes 0.18.
    """
    return (left_BC + right_BC).amax(-1) >= left_BC.amax(-1) + right_BC.amax(-1)


def _shaped(
    logits_BC: torch.Tensor, bias_C: torch.Tensor | None, student: _Student
) -> torch.Tensor:
    """The model's logits from the product of hidden states and weight."""
    y_BC = logits_BC if bias_C is None else logits_BC + bias_C
    if student.scale != 1.0:
        y_BC = y_BC * student.scale
    if student.softcap is not None:
        y_BC = student.softcap * torch.tanh(y_BC / student.softcap)
    return y_BC


def _unshaped(
    slope_BC: torch.Tensor,
    logits_BC: torch.Tensor,
    bias_C: torch.Tensor | None,
    student: _Student,
) -> torch.Tensor:
    """The derivative by that product, from the one by the model's logits."""
    if student.softcap is not None:
        capped_BC = _shaped(logits_BC, bias_C, student) / student.softcap
        slope_BC = slope_BC * (1 - capped_BC * capped_BC)
    return slope_BC if student.scale == 1.0 else slope_BC * student.scale


def _chunks(hidden_NH: torch.Tensor, student: _Student) -> list[slice]:
    """Rows of each chunk, nearly equally many."""
    num_rows = hidden_NH.shape[0]
    most = max(1, student.chunk_bytes // (hidden_NH.element_size() * student.size))
    rows = max(1, -(-num_rows // max(1, -(-num_rows // most))))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _block_rows(logits_RC: torch.Tensor) -> int:
    return max(1, block_bytes(logits_RC.device.type) // (4 * logits_RC.shape[1]))


def _autocast(hidden_NH: torch.Tensor) -> torch.Tensor:
    kind = hidden_NH.device.type
    is_on = torch.is_autocast_enabled(kind) and hidden_NH.dtype != torch.float64
    return hidden_NH.to(torch.get_autocast_dtype(kind)) if is_on else hidden_NH
