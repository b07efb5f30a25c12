from dataclasses import replace

import pytest
import torch

from tunesmith.ops.lora import Projection, project, project_add, project_reference

SIZES = (12, 5, 7)


def make_projections(
    ranks: tuple[int, ...], *, has_bias: bool = False, trains_weight: bool = False
) -> list[Projection]:
    torch.manual_seed(1)
    projections: list[Projection] = []
    for size, rank in zip(SIZES, ranks, strict=False):
        weight = torch.randn(size, 9, dtype=torch.float64, requires_grad=trains_weight)
        bias = torch.randn(size, dtype=torch.float64, requires_grad=trains_weight)
        made = Projection(weight, bias if has_bias else None)
        if rank:
            a = torch.randn(rank, 9, dtype=torch.float64, requires_grad=True)
            b = torch.randn(size, rank, dtype=torch.float64, requires_grad=True)
            made = replace(made, a_RI=a, b_OR=b, scale=0.7 * rank)
        projections.append(made)
    return projections


def trained(projections: list[Projection]) -> list[torch.Tensor]:
    tensors = [tensor for each in projections for tensor in each.tensors()]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 8, 64), (0, 3, 0), (2,), (0, 0)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("trains_weight", [False, True])
def test_equals_the_reference(ranks: tuple[int, ...], has_bias: bool, trains_weight: bool) -> None:
    projections = make_projections(ranks, has_bias=has_bias, trains_weight=trains_weight)
    x_TI = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    found, expected = project(x_TI, projections), project_reference(x_TI, projections)
    seeds = [torch.randn_like(y) for y in expected]
    wanted = [x_TI, *trained(projections)]
    for ours, theirs in zip(
        (*found, *torch.autograd.grad(found, wanted, seeds)),
        (*expected, *torch.autograd.grad(expected, wanted, seeds)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_carry_is_added(has_bias: bool) -> None:
    (projection,) = make_projections((3,), has_bias=has_bias)
    x_TI = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    carry_TO = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    found = project_add(carry_TO, x_TI, projection)
    expected = carry_TO + project_reference(x_TI, [projection])[0]
    seed = torch.randn_like(expected)
    wanted = [carry_TO, x_TI, *trained([projection])]
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, wanted, seed)),
        (expected, *torch.autograd.grad(expected, wanted, seed)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_weight_may_be_made_on_demand() -> None:
    """As quantized weights are: once in the forward, once in the backward."""
    projections = make_projections((3, 2))
    calls: list[torch.dtype] = []

    def made_on_demand(projection: Projection) -> Projection:
        def dense(dtype: torch.dtype) -> torch.Tensor:
            calls.append(dtype)
            return projection.weight(dtype)

        return replace(projection, weight_OI=dense)

    x_TI = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    lazy = [made_on_demand(each) for each in projections]
    for found, expected in zip(project(x_TI, lazy), project(x_TI, projections), strict=True):
        assert torch.equal(found, expected)
    calls.clear()
    torch.autograd.grad(sum(y.sum() for y in project(x_TI, lazy)), x_TI)
    assert calls == [torch.float64] * 4


def test_nothing_is_computed_for_an_input_without_gradient() -> None:
    """The first layer's input needs none: its weights are not read in the backward."""
    (projection,) = make_projections((3,))
    weight, reads = projection.weight_OI, []

    def dense(dtype: torch.dtype) -> torch.Tensor:
        reads.append(dtype)
        assert isinstance(weight, torch.Tensor)
        return weight

    (y,) = project(torch.randn(6, 9, dtype=torch.float64), [replace(projection, weight_OI=dense)])
    y.sum().backward()
    assert len(reads) == 1


def test_no_wide_copies_of_activations_are_kept() -> None:
    """In bfloat16 with float32 adapters, the input and the inner rows are kept as they are."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    projections = [
        Projection(
            torch.randn(16, 32, dtype=torch.bfloat16),
            a_RI=torch.randn(4, 32, requires_grad=True),
            b_OR=torch.randn(16, 4, requires_grad=True),
        )
        for _ in range(3)
    ]
    x_TI = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = project(x_TI, projections)
    tall = [tensor for tensor in kept if tensor.shape[0] == 64]
    assert [tuple(tensor.shape) for tensor in tall] == [(64, 32), (64, 12)]
    assert all(tensor.dtype == torch.bfloat16 for tensor in (*tall, *outputs))
