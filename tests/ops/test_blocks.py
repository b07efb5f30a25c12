from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import silu

from tunesmith.ops.blocks import gated_mlp, norm, norm_project, rotate_both
from tunesmith.ops.kernels import fused_kernels
from tunesmith.ops.lora import Projection, project_reference

EPS = 1e-5


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_projection(outputs: int, inputs: int, *, trains_weight: bool) -> Projection:
    weight = rand(outputs, inputs).detach().requires_grad_(trains_weight)
    return Projection(weight, a_RI=rand(3, inputs), b_OR=rand(outputs, 3), scale=0.5)


def assert_same(
    found: Callable[[], tuple[torch.Tensor, ...]],
    expected: Callable[[], tuple[torch.Tensor, ...]],
    wanted: list[torch.Tensor],
) -> None:
    ours, theirs = found(), expected()
    seeds = [torch.randn_like(y) for y in theirs]
    for a, b in zip(
        (*ours, *torch.autograd.grad(ours, wanted, seeds)),
        (*theirs, *torch.autograd.grad(theirs, wanted, seeds)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def tensors_of(projections: list[Projection]) -> list[torch.Tensor]:
    tensors = [tensor for each in projections for tensor in each.tensors()]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def test_norm() -> None:
    x, weight = rand(5, 3, 8), rand(8)
    assert_same(lambda: (norm(x, weight, EPS),), lambda: (plain_norm(x, weight),), [x, weight])


@pytest.mark.parametrize("trains_weight", [False, True])
def test_norm_project(trains_weight: bool) -> None:
    torch.manual_seed(0)
    x, weight = rand(6, 8), rand(8)
    projections = [make_projection(n, 8, trains_weight=trains_weight) for n in (12, 4, 4)]
    assert_same(
        lambda: norm_project(x, weight, EPS, projections),
        lambda: (x * 1, *project_reference(plain_norm(x, weight), projections)),
        [x, weight, *tensors_of(projections)],
    )


@pytest.mark.parametrize("keeps_inner", [False, True])
@pytest.mark.parametrize("trains_weight", [False, True])
def test_gated_mlp(keeps_inner: bool, trains_weight: bool) -> None:
    torch.manual_seed(0)
    x, weight = rand(6, 8), rand(8)
    gate, up, down = (
        make_projection(*size, trains_weight=trains_weight) for size in ((10, 8), (10, 8), (8, 10))
    )

    def expected() -> tuple[torch.Tensor, ...]:
        g, u = project_reference(plain_norm(x, weight), [gate, up])
        return (x + project_reference(silu(g) * u, [down])[0],)

    assert_same(
        lambda: (gated_mlp(x, weight, EPS, [gate, up, down], keeps_inner=keeps_inner),),
        expected,
        [x, weight, *tensors_of([gate, up, down])],
    )


def test_rotate_both() -> None:
    query, key = rand(5, 4, 8), rand(5, 2, 8)
    angles = torch.randn(5, 4, dtype=torch.float64)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x[..., :4].contiguous(), x[..., 4:].contiguous())
        out = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([out.real, out.imag], -1)

    assert_same(
        lambda: rotate_both(query, key, cos, sin),
        lambda: (turned(query), turned(key)),
        [query, key],
    )


@pytest.mark.slow
def test_compiled_kernels_compute_the_same() -> None:
    with fused_kernels():
        test_norm()
        test_gated_mlp(keeps_inner=True, trains_weight=False)
        test_norm_project(trains_weight=True)
        test_rotate_both()


def test_a_norm_of_three_dimensions_sums_before_it_rounds() -> None:
    """Rows of all leading dimensions are added up in fp32, then rounded once."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, 8).bfloat16()
    weight = torch.randn(8).bfloat16().requires_grad_()
    norm(x, weight, EPS).float().sum().backward()
    wide = weight.detach().float().requires_grad_()
    plain_norm(x.float(), wide).sum().backward()
    assert weight.grad is not None and wide.grad is not None
    torch.testing.assert_close(weight.grad.float(), wide.grad, rtol=2**-7, atol=0.02)
