"""Chains of elementwise operations, in plain torch or fused by torch's compiler.

Eager torch writes every intermediate result to memory; a compiler makes one pass of a chain. On
1,232 tokens of SmolLM2-135M (two AMX cores, bfloat16): RMS norm 0.77 against 0.22 ms, its gradient
1.5 against 0.36, SwiGLU's gradient 8.6 against 1.3. The compiler needs seconds to start, so `fused`
is for long runs.

Shape letters: T tokens, H hidden size, F intermediate size, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

_KERNELS: list[Kernel] = []


class Kernel:
    """A function of tensors that can be switched to its compiled form."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.call = plain
        self.__doc__ = plain.__doc__

    def __call__(self, *args: Any) -> Any:
        """Runs the plain or the compiled form."""
        return self.call(*args)


def kernel(plain: Callable[..., Any]) -> Kernel:
    """Makes a pure function of tensors and numbers a kernel, to be used without gradients."""
    made = Kernel(plain)
    _KERNELS.append(made)
    return made


def fuse_kernels(*, is_on: bool) -> None:
    """Switches all kernels of this process; compiling happens at each one's first call."""
    for each in _KERNELS:
        each.call = torch.compile(each.plain, dynamic=True) if is_on else each.plain


def are_fused() -> bool:
    """Whether kernels are in their compiled form."""
    return any(each.call is not each.plain for each in _KERNELS)


@contextmanager
def fused_kernels() -> Generator[None]:
    """Compiled kernels inside the block. For tests."""
    fuse_kernels(is_on=True)
    try:
        yield
    finally:
        fuse_kernels(is_on=False)


@kernel
def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm (arXiv 1910.07467, eq. 4) as Llama does it: normed in fp32, weighted in x's dtype.

    Returns:
        the normed rows, and their reciprocal root mean squares `[T, 1]` in fp32 or wider.
    """
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    rstd_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    return (wide_TH * rstd_T1).to(x_TH.dtype) * weight_H, rstd_T1


@kernel
def rms_norm_again(
    x_TH: torch.Tensor, weight_H: torch.Tensor, rstd_T1: torch.Tensor
) -> torch.Tensor:
    """The normed rows once more, from what the forward kept."""
    return (x_TH.to(rstd_T1.dtype) * rstd_T1).to(x_TH.dtype) * weight_H


@kernel
def rms_norm_grad(
    grad_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    rstd_T1: torch.Tensor,
    carry_TH: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of `rms_norm` for its input, plus `carry_TH` (what flows past the norm)."""
    unit_TH = x_TH.to(rstd_T1.dtype) * rstd_T1
    slope_TH = (grad_TH * weight_H).to(rstd_T1.dtype)
    mean_T1 = (slope_TH * unit_TH).mean(-1, keepdim=True)
    dx_TH = ((slope_TH - unit_TH * mean_T1) * rstd_T1).to(x_TH.dtype)
    return dx_TH if carry_TH is None else dx_TH + carry_TH


@kernel
def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (arXiv 2002.05202, eq. 6)."""
    return torch.nn.functional.silu(gate_TF) * up_TF


@kernel
def swiglu_grad(
    grad_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the product once more, gradient of gate, gradient of up)."""
    silu_TF = torch.nn.functional.silu(gate_TF)
    dgate_TF = torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF)
    return silu_TF * up_TF, dgate_TF, grad_TF * silu_TF


@kernel
def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864, eq. 34), the halves of a head rotated."""
    half = x_TND.shape[-1] // 2
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    first = x_TND[..., :half] * cos[..., :half] - x_TND[..., half:] * sin[..., :half]
    second = x_TND[..., half:] * cos[..., half:] + x_TND[..., :half] * sin[..., half:]
    return torch.cat([first, second], -1)
