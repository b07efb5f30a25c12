import pytest
import torch

from tunesmith.ops.linear_logp import linear_logp, linear_logp_reference


def make_inputs(
    rows: int, *, is_frozen: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=not is_frozen)
    return hidden, weight, torch.randint(0, 50, (rows,))


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (2.0, 1.5)])
def test_equals_the_reference(
    is_frozen: bool, rows_per_chunk: int, scale: float, softcap: float | None
) -> None:
    hidden, weight, target = make_inputs(7, is_frozen=is_frozen)
    ours = linear_logp(
        hidden, weight, target, scale=scale, softcap=softcap,
        chunk_bytes=rows_per_chunk * 4 * 50,
    )  # fmt: skip
    expected = linear_logp_reference(hidden, weight, target, scale=scale, softcap=softcap)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(7, dtype=torch.float64)
    inputs = [hidden] if is_frozen else [hidden, weight]
    for mine, theirs in zip(
        torch.autograd.grad((ours * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_equals_cross_entropy_with_ignored_rows() -> None:
    hidden, weight, target = make_inputs(9, is_frozen=True)
    labels = target.clone()
    labels[::3] = -100
    kept = labels != -100
    ours = -linear_logp(hidden[kept], weight, labels[kept]).mean()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_no_rows_give_a_zero_sum_and_zero_gradients() -> None:
    hidden, weight, target = make_inputs(4, is_frozen=True)
    total = linear_logp(hidden[:0], weight, target[:0]).sum()
    assert total.item() == 0.0
    (grad,) = torch.autograd.grad(total, [hidden])
    assert torch.equal(grad, torch.zeros_like(hidden))


def test_bfloat16_gives_float32_within_its_precision() -> None:
    hidden, weight, target = make_inputs(20, is_frozen=True, dtype=torch.bfloat16)
    ours = linear_logp(hidden, weight, target)
    expected = linear_logp_reference(hidden.double(), weight.double(), target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.1)


def test_works_without_gradients() -> None:
    hidden, weight, target = make_inputs(5, is_frozen=False)
    with torch.no_grad():
        ours = linear_logp(hidden, weight, target)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, linear_logp_reference(hidden, weight, target).detach())
