"""The parts of a Llama-like decoder layer as autograd functions that keep little and redo little.

Kept for the backward are the residual stream, reciprocal roots, rotated q and k, v, gate and up;
normed rows and the SwiGLU product are made again, which costs about 1 % of a step.

Shape letters: T tokens, H hidden size, F intermediate size, N heads, D head size, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.ops.kernels import (
    rms_norm,
    rms_norm_again,
    rms_norm_grad,
    rotate,
    swiglu,
    swiglu_grad,
)
from tunesmith.ops.lora import Grad, Projection, Spec, flatten


def norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of rows."""
    output: Any = _Norm.apply(x_TH, weight_H, eps)
    return output


def norm_project(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, projections: Sequence[Projection]
) -> tuple[torch.Tensor, ...]:
    """(x itself, the projections of its norm): use this x further on, its gradient adds up here."""
    tensors = flatten(projections)
    outputs: Any = _NormProject.apply(x_TH, weight_H, eps, Spec.of(projections), *tensors)
    return outputs


def rotate_both(
    query_TND: torch.Tensor, key_TKD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of queries and keys; both halves of a head share their angles."""
    outputs: Any = _Rotate.apply(query_TND, key_TKD, cos_TD, sin_TD)
    return outputs


def gated_mlp(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    projections: Sequence[Projection],
    *,
    keeps_inner: bool = True,
) -> torch.Tensor:
    """`x + down(silu(gate(n)) * up(n))` with `n = norm(x)`.

    Args:
        x_TH: the residual stream.
        weight_H: of the norm.
        eps: of the norm.
        projections: gate, up, down.
        keeps_inner: keep gate's and up's outputs, else make them again (2F of memory a token for
            two matrix products).
    """
    spec = Spec.of(projections)
    output: Any = _GatedMlp.apply(x_TH, weight_H, eps, spec, keeps_inner, *flatten(projections))
    return output


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        normed_TH, rstd_T1 = rms_norm(x_TH, weight_H, eps)
        ctx.save_for_backward(x_TH, weight_H, rstd_T1)
        return normed_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        x_TH, weight_H, rstd_T1 = ctx.saved_tensors
        dx_TH = rms_norm_grad(grads[0], x_TH, weight_H, rstd_T1, None)
        dweight_H = _norm_weight_grad(ctx.needs_input_grad[1], grads[0], x_TH, weight_H, rstd_T1)
        return dx_TH, dweight_H, None


class _NormProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        spec: Spec,
        *tensors: Grad,
    ) -> Any:
        normed_TH, rstd_T1 = rms_norm(x_TH, weight_H, eps)
        outputs, inner_TR = spec.fill(tensors).forward(normed_TH)
        ctx.spec = spec
        ctx.save_for_backward(x_TH, weight_H, rstd_T1, inner_TR, *tensors)
        return (x_TH, *outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        x_TH, weight_H, rstd_T1, inner_TR, *tensors = ctx.saved_tensors
        needs_x, needs_norm, _, _, *needs = ctx.needs_input_grad
        group = ctx.spec.fill(tensors)
        carry_TH, *of_outputs = grads
        normed_TH = rms_norm_again(x_TH, weight_H, rstd_T1)
        dn_TH, dinner_TR = group.input_grad(of_outputs, is_wanted=needs_x or needs_norm)
        rest = group.weight_grads(normed_TH, inner_TR, dinner_TR, of_outputs, needs)
        if dn_TH is None:
            return None, None, None, None, *rest
        dx_TH = rms_norm_grad(dn_TH, x_TH, weight_H, rstd_T1, carry_TH) if needs_x else None
        dweight_H = _norm_weight_grad(needs_norm, dn_TH, x_TH, weight_H, rstd_T1)
        return dx_TH, dweight_H, None, None, *rest


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TND: torch.Tensor,
        key_TKD: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
    ) -> Any:
        ctx.save_for_backward(cos_TD, sin_TD)
        return rotate(query_TND, cos_TD, sin_TD), rotate(key_TKD, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        back_TD = -sin_TD
        return rotate(grads[0], cos_TD, back_TD), rotate(grads[1], cos_TD, back_TD), None, None


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weight_H: torch.Tensor,
        eps: float,
        spec: Spec,
        keeps_inner: bool,
        *tensors: Grad,
    ) -> torch.Tensor:
        both, down = _both_and_down(spec, tensors)
        normed_TH, rstd_T1 = rms_norm(x_TH, weight_H, eps)
        (gate_TF, up_TF), inner_TR = both.forward(normed_TH)
        (output,), down_inner = down.forward(swiglu(gate_TF, up_TF), x_TH)
        ctx.spec = spec
        kept = (gate_TF, up_TF) if keeps_inner else (None, None)
        ctx.save_for_backward(x_TH, weight_H, rstd_T1, *kept, inner_TR, down_inner, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        x_TH, weight_H, rstd_T1, gate_TF, up_TF, inner_TR, down_inner, *tensors = ctx.saved_tensors
        needs_x, needs_norm, _, _, _, *needs = ctx.needs_input_grad
        both, down = _both_and_down(ctx.spec, tensors)
        normed_TH = rms_norm_again(x_TH, weight_H, rstd_T1)
        if gate_TF is None:
            (gate_TF, up_TF), _ = both.forward(normed_TH)
        dproduct_TF, down_dinner = down.input_grad(grads, is_wanted=True)
        product_TF, *inner_grads = swiglu_grad(dproduct_TF, gate_TF, up_TF)
        of_down = down.weight_grads(product_TF, down_inner, down_dinner, grads, needs[8:])
        # Of three [T, F] tensors each, only what is still needed stays alive.
        del product_TF, dproduct_TF, gate_TF, up_TF
        dn_TH, dinner_TR = both.input_grad(inner_grads, is_wanted=needs_x or needs_norm)
        rest = both.weight_grads(normed_TH, inner_TR, dinner_TR, inner_grads, needs[:8])
        if dn_TH is None:
            return None, None, None, None, None, *rest, *of_down
        dx_TH = rms_norm_grad(dn_TH, x_TH, weight_H, rstd_T1, grads[0]) if needs_x else None
        dweight_H = _norm_weight_grad(needs_norm, dn_TH, x_TH, weight_H, rstd_T1)
        return dx_TH, dweight_H, None, None, None, *rest, *of_down


def _both_and_down(spec: Spec, tensors: Sequence[Grad]) -> tuple[Any, Any]:
    return Spec(spec.bare[:2]).fill(tensors[:8]), Spec(spec.bare[2:]).fill(tensors[8:])


def _norm_weight_grad(
    is_needed: bool,
    grad_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    rstd_T1: torch.Tensor,
) -> Grad:
    if not is_needed:
        return None
    slope = grad_TH * (x_TH.to(rstd_T1.dtype) * rstd_T1)
    return slope.flatten(0, -2).sum(0).to(weight_H.dtype)
