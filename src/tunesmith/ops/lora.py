"""Linear projections that share their input, with LoRA (arXiv 2106.09685) on top where it is there.

Autograd keeps an input for every projection, and another one for every adapter. Here the input is
kept once for all of a group (q, k, v; gate, up), the A matrices are stacked so that it is read
once, and each adapter's part is added in the epilogue of a matrix product. The numbers are those of
PEFT's layers; `project_reference` is the slow and obvious form.

Shape letters: T tokens, I inputs, O outputs, R rank (summed over a group where A is stacked).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear

Dense = Callable[[torch.dtype], torch.Tensor]
"""Makes a quantized weight dense, into a buffer that is valid until the next call."""

Grad = torch.Tensor | None


@dataclass(frozen=True)
class Projection:
    """`y = x W^T + bias + scale * (x A^T) B^T`; without `a_RI` and `b_OR` there is no adapter."""

    weight_OI: torch.Tensor | Dense
    bias_O: torch.Tensor | None = None
    a_RI: torch.Tensor | None = None
    b_OR: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.a_RI is None else self.a_RI.shape[0]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight in `dtype`."""
        if isinstance(self.weight_OI, torch.Tensor):
            return self.weight_OI.to(dtype)
        return self.weight_OI(dtype)

    def tensors(self) -> tuple[Grad, Grad, Grad, Grad]:
        """Everything that may take a gradient, in the order that `Group` gives gradients in."""
        weight = self.weight_OI if isinstance(self.weight_OI, torch.Tensor) else None
        return weight, self.bias_O, self.a_RI, self.b_OR

    def with_tensors(self, tensors: Sequence[Grad]) -> Projection:
        """The same projection of these tensors."""
        weight, bias, a, b = tensors
        kept = self.weight_OI if weight is None else weight
        return replace(self, weight_OI=kept, bias_O=bias, a_RI=a, b_OR=b)


def project(x_TI: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """All projections of one input, `[T, O]` each."""
    tensors = flatten(projections)
    outputs: Any = _Project.apply(x_TI, Spec.of(projections), *tensors)
    return outputs


def project_add(carry_TO: torch.Tensor, x_TI: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`carry + projection(x)` with the sum in the matrix product's epilogue."""
    output: Any = _ProjectAdd.apply(carry_TO, x_TI, Spec.of([projection]), *projection.tensors())
    return output


def project_reference(
    x_TI: torch.Tensor, projections: Sequence[Projection]
) -> tuple[torch.Tensor, ...]:
    """The slow and obvious form of `project`. For tests."""
    outputs: list[torch.Tensor] = []
    for each in projections:
        y_TO = linear(x_TI, each.weight(x_TI.dtype), each.bias_O)
        if each.a_RI is not None and each.b_OR is not None:
            y_TO = y_TO + each.scale * linear(linear(x_TI, each.a_RI), each.b_OR)
        outputs.append(y_TO)
    return tuple(outputs)


# What the autograd functions of this folder share


def flatten(projections: Sequence[Projection]) -> list[Grad]:
    """The tensors of all projections in a row, four for each."""
    return [tensor for each in projections for tensor in each.tensors()]


@dataclass(frozen=True)
class Spec:
    """What of projections is not a tensor: it goes into an autograd function as it is."""

    bare: tuple[Projection, ...]

    @classmethod
    def of(cls, projections: Sequence[Projection]) -> Spec:
        """The projections without their tensors."""
        return cls(tuple(each.with_tensors((None,) * 4) for each in projections))

    def __len__(self) -> int:
        return len(self.bare)

    def fill(self, tensors: Sequence[Grad]) -> Group:
        """The projections with these tensors, as `flatten` gave them."""
        quads = [tensors[4 * n : 4 * n + 4] for n in range(len(self.bare))]
        return Group([p.with_tensors(quad) for p, quad in zip(self.bare, quads, strict=True)])


class Group:
    """Projections of one input, outside of autograd: forward and backward by hand."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = projections
        self.ranks = [each.rank for each in projections]

    def stacked_a(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The A matrices of all adapters, `[R, I]`."""
        parts = [each.a_RI for each in self.projections if each.a_RI is not None]
        if not parts:
            return None
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    def forward(
        self, x_TI: torch.Tensor, carry_TO: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The outputs, and `inner_TR`, the input through all A matrices.

        Args:
            x_TI: the input.
            carry_TO: added to the outputs.
        """
        a_RI = self.stacked_a(x_TI.dtype)
        inner_TR = None if a_RI is None else x_TI @ a_RI.t()
        outputs: list[torch.Tensor] = []
        for each, inner in zip(self.projections, self._of_each(inner_TR), strict=True):
            weight = each.weight(x_TI.dtype)
            bias = None if each.bias_O is None else each.bias_O.to(x_TI.dtype)
            if carry_TO is None:
                y_TO = linear(x_TI, weight, bias)
            else:
                y_TO = torch.addmm(carry_TO if bias is None else carry_TO + bias, x_TI, weight.t())
            if inner is not None and each.b_OR is not None:
                y_TO.addmm_(inner, each.b_OR.to(x_TI.dtype).t(), alpha=each.scale)
            outputs.append(y_TO)
        return outputs, inner_TR

    def input_grad(
        self, grads: Sequence[torch.Tensor], *, is_wanted: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(gradient of the input, gradient of `inner_TR`), neither of which needs the input."""
        inner_grads = [
            dy @ each.b_OR.to(dy.dtype).mul(each.scale)
            for dy, each in zip(grads, self.projections, strict=True)
            if each.b_OR is not None
        ]
        dinner_TR = torch.cat(inner_grads, 1) if inner_grads else None
        if not is_wanted:
            return None, dinner_TR
        dx_TI = grads[0] @ self.projections[0].weight(grads[0].dtype)
        for dy, each in zip(grads[1:], self.projections[1:], strict=True):
            dx_TI.addmm_(dy, each.weight(dy.dtype))
        a_RI = self.stacked_a(dx_TI.dtype)
        if dinner_TR is not None and a_RI is not None:
            dx_TI.addmm_(dinner_TR, a_RI)
        return dx_TI, dinner_TR

    def weight_grads(
        self,
        x_TI: torch.Tensor,
        inner_TR: torch.Tensor | None,
        dinner_TR: torch.Tensor | None,
        grads: Sequence[torch.Tensor],
        needs: Sequence[bool],
    ) -> list[Grad]:
        """Gradients of all tensors, as `flatten` lays them out; None where none is needed."""
        da_RI = None
        if dinner_TR is not None and any(needs[2::4]):
            da_RI = dinner_TR.t() @ x_TI
        das = self._of_each(None if da_RI is None else da_RI.t())
        found: list[Grad] = []
        inners = self._of_each(inner_TR)
        for number, (each, dy_TO) in enumerate(zip(self.projections, grads, strict=True)):
            weight, bias, a, b = needs[4 * number : 4 * number + 4]
            inner, da = inners[number], das[number]
            found.append(_like(dy_TO.t() @ x_TI, each.weight_OI) if weight else None)
            found.append(_like(dy_TO.sum(0), each.bias_O) if bias else None)
            found.append(_like(da.t(), each.a_RI) if a and da is not None else None)
            if b and inner is not None:
                found.append(_like((dy_TO.t() @ inner).mul_(each.scale), each.b_OR))
            else:
                found.append(None)
        return found

    def _of_each(self, stacked_XR: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The columns of each projection; None for those without an adapter."""
        if stacked_XR is None:
            return [None] * len(self.ranks)
        parts = stacked_XR.split(self.ranks, 1)
        return [part if rank else None for part, rank in zip(parts, self.ranks, strict=True)]


def _like(grad: torch.Tensor, parameter: Any) -> torch.Tensor:
    return grad.to(parameter.dtype)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, spec: Spec, *tensors: Grad) -> Any:
        outputs, inner_TR = spec.fill(tensors).forward(x_TI)
        ctx.spec = spec
        ctx.save_for_backward(x_TI, inner_TR, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        x_TI, inner_TR, *tensors = ctx.saved_tensors
        group = ctx.spec.fill(tensors)
        dx_TI, dinner_TR = group.input_grad(grads, is_wanted=ctx.needs_input_grad[0])
        needs = ctx.needs_input_grad[2:]
        return dx_TI, None, *group.weight_grads(x_TI, inner_TR, dinner_TR, grads, needs)


class _ProjectAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carry_TO: torch.Tensor, x_TI: torch.Tensor, spec: Spec, *tensors: Grad
    ) -> torch.Tensor:
        (output,), inner_TR = spec.fill(tensors).forward(x_TI, carry_TO)
        ctx.spec = spec
        ctx.save_for_backward(x_TI, inner_TR, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Grad, ...]:
        x_TI, inner_TR, *tensors = ctx.saved_tensors
        group = ctx.spec.fill(tensors)
        dx_TI, dinner_TR = group.input_grad(grads, is_wanted=ctx.needs_input_grad[1])
        needs = ctx.needs_input_grad[3:]
        rest = group.weight_grads(x_TI, inner_TR, dinner_TR, grads, needs)
        return grads[0] if ctx.needs_input_grad[0] else None, dx_TI, None, *rest
