from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.ops import linear_logp as module
from tunesmith.ops.kernels import fused_kernels
from tunesmith.ops.linear_logp import linear_logp, row_losses

V, H = 50, 16


def linear_cross_entropy(*inputs: Any, **how: Any) -> Any:
    """The sum alone."""
    return module.linear_cross_entropy(*inputs, **how)[0]


class Inputs:
    """Random rows, a head, targets and weights; `requires_grad` as asked."""

    def __init__(
        self, rows: int, *, is_frozen: bool, has_bias: bool = False, dtype: Any = torch.float64
    ) -> None:
        torch.manual_seed(1)
        self.hidden = torch.randn(rows, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype, requires_grad=not is_frozen)
        self.bias = torch.randn(V, dtype=dtype, requires_grad=not is_frozen) if has_bias else None
        self.target = torch.randint(0, V, (rows,))
        self.factor = torch.rand(rows, dtype=torch.float64)

    @property
    def learned(self) -> list[torch.Tensor]:
        every = [self.hidden, self.weight, self.bias]
        return [tensor for tensor in every if tensor is not None and tensor.requires_grad]

    def logits(self) -> torch.Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


FORMS: list[dict[str, Any]] = [
    {},
    {"scale": 0.5},
    {"scale": 2.0, "softcap": 1.5},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"scale": 0.7, "softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.5},
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, so that a chunk has several."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * V)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 5, 1000])
def test_cross_entropy_equals_the_reference(
    form: dict[str, Any], is_frozen: bool, has_bias: bool, rows_per_chunk: int
) -> None:
    x = Inputs(7, is_frozen=is_frozen, has_bias=has_bias)
    expected = (row_losses(x.logits(), x.target, **form) * x.factor).sum() * 0.37
    expected_grads = torch.autograd.grad(expected, x.learned)
    ours = linear_cross_entropy(
        x.hidden, x.weight, x.target, x.factor,
        bias_V=x.bias, chunk_bytes=rows_per_chunk * 8 * V, **form,
    )  # fmt: skip
    close(ours * 0.37, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours * 0.37, x.learned), expected_grads, strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_logp_equals_the_reference(
    form: dict[str, Any], is_frozen: bool, has_bias: bool, rows_per_chunk: int
) -> None:
    x = Inputs(7, is_frozen=is_frozen, has_bias=has_bias)
    ours = linear_logp(
        x.hidden, x.weight, x.target, bias_V=x.bias, chunk_bytes=rows_per_chunk * 8 * V, **form
    )
    expected = -row_losses(x.logits(), x.target, **form)
    close(ours, expected)
    upstream = torch.randn(7, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * upstream).sum(), x.learned),
        torch.autograd.grad((expected * upstream).sum(), x.learned),
        strict=True,
    ):
        close(mine, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torchs_cross_entropy_with_ignored_rows(smoothing: float) -> None:
    x = Inputs(9, is_frozen=True)
    labels = x.target.clone()
    labels[::3] = -100
    kept = labels != -100
    expected = cross_entropy(x.logits(), labels, label_smoothing=smoothing, reduction="sum")
    ones = torch.ones(int(kept.sum()))
    ours = linear_cross_entropy(
        x.hidden[kept], x.weight, labels[kept], ones, label_smoothing=smoothing
    )
    close(ours, expected)
    # The same by weights of 0 on all rows: padding costs nothing but time.
    padded = linear_cross_entropy(
        x.hidden, x.weight, labels.clamp(min=0), kept.double(), label_smoothing=smoothing
    )
    close(padded, expected)
    if smoothing == 0:
        close(-linear_logp(x.hidden[kept], x.weight, labels[kept]).sum(), expected)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_no_rows_give_zero_and_zero_gradients(is_frozen: bool) -> None:
    x = Inputs(4, is_frozen=is_frozen, has_bias=True)
    none = slice(0, 0)
    for total in (
        linear_logp(x.hidden[none], x.weight, x.target[none], bias_V=x.bias).sum(),
        linear_cross_entropy(
            x.hidden[none], x.weight, x.target[none], x.factor[none], bias_V=x.bias
        ),
    ):
        assert total.item() == 0.0
        for grad in torch.autograd.grad(total, x.learned):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_gradient_of_a_tied_head_adds_to_the_embeddings() -> None:
    torch.manual_seed(2)
    table = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    ids, target = torch.randint(0, V, (6,)), torch.randint(0, V, (6,))
    expected = cross_entropy(table[ids].tanh() @ table.T, target, reduction="sum")
    ours = linear_cross_entropy(table[ids].tanh(), table, target, torch.ones(6))
    for mine, theirs in zip(
        torch.autograd.grad(ours, [table]), torch.autograd.grad(expected, [table]), strict=True
    ):
        close(mine, theirs)


def test_only_the_head_is_trained() -> None:
    x = Inputs(5, is_frozen=False)
    rows = x.hidden.detach()
    ours = linear_cross_entropy(rows, x.weight, x.target, torch.ones(5))
    expected = cross_entropy(rows @ x.weight.T, x.target, reduction="sum")
    (mine,) = torch.autograd.grad(ours, [x.weight])
    (theirs,) = torch.autograd.grad(expected, [x.weight])
    close(mine, theirs)


def test_works_without_gradients() -> None:
    x = Inputs(5, is_frozen=False)
    with torch.no_grad():
        logp = linear_logp(x.hidden, x.weight, x.target)
        loss = linear_cross_entropy(x.hidden, x.weight, x.target, x.factor)
    assert not logp.requires_grad and not loss.requires_grad
    close(-(logp * x.factor).sum(), loss)
    close(logp, -row_losses(x.logits(), x.target).detach())


def test_a_second_backward_is_refused() -> None:
    x = Inputs(5, is_frozen=True)
    loss = linear_cross_entropy(x.hidden, x.weight, x.target, x.factor)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (loss * 2).backward()


@pytest.mark.parametrize("is_frozen", [True, False])
def test_bfloat16_is_no_less_exact_than_the_usual_way(is_frozen: bool) -> None:
    """Against fp64: the loss and each gradient, beside `cross_entropy(logits.float())`."""
    torch.manual_seed(3)
    rows, size, vocabulary = 64, 64, 997
    hidden = torch.randn(rows, size).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, size) * 0.2).bfloat16().float().requires_grad_(not is_frozen)
    target = torch.randint(0, vocabulary, (rows,))
    learned = [hidden] if is_frozen else [hidden, weight]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, learned))]

    exact = gradients(cross_entropy(hidden.double() @ weight.double().T, target, reduction="sum"))
    usual = gradients(
        cross_entropy((hidden @ weight.bfloat16().T).float(), target, reduction="sum")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, torch.ones(rows))
    assert loss.dtype == torch.float32
    for mine, theirs, truth in zip(gradients(loss), usual, exact, strict=True):
        error, usual_error = (mine - truth).norm(), (theirs - truth).norm()
        assert error <= 1.05 * usual_error + 1e-9, (error, usual_error)


def test_bfloat16_logp_gives_float32() -> None:
    x = Inputs(20, is_frozen=True, dtype=torch.bfloat16)
    ours = linear_logp(x.hidden, x.weight, x.target)
    assert ours.dtype == torch.float32
    exact = -row_losses(x.hidden.double() @ x.weight.double().T, x.target)
    close(ours.double(), exact, 0.1)
    (grad,) = torch.autograd.grad(ours.sum(), [x.hidden])
    assert grad.dtype == torch.bfloat16


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@contextmanager
def largest_tensor() -> Iterator[Sizes]:
    with Sizes() as sizes:
        yield sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_full_logits_never_appear(dtype: torch.dtype) -> None:
    rows, budget = 200, 16 * 4 * V
    x = Inputs(rows, is_frozen=True, dtype=dtype)
    ones = torch.ones(rows)
    with largest_tensor() as sizes:
        linear_cross_entropy(x.hidden, x.weight, x.target, ones, chunk_bytes=budget).backward()
    assert sizes.largest <= max(budget // x.hidden.element_size(), rows * H)
    with largest_tensor() as sizes:
        row_losses(x.logits(), x.target).sum().backward()
    assert sizes.largest == rows * V


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_plain(form: dict[str, Any], dtype: torch.dtype) -> None:
    x = Inputs(7, is_frozen=True, has_bias=True, dtype=dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = linear_cross_entropy(
            x.hidden, x.weight, x.target, x.factor, bias_V=x.bias, chunk_bytes=3 * 4 * V, **form
        )
        return loss.detach(), torch.autograd.grad(loss, [x.hidden])[0].float()

    plain = run()
    with fused_kernels():
        fused = run()
    close(fused[0], plain[0], 1e-4)
    close(fused[1], plain[1], 1e-5 if dtype == torch.float32 else 0.02)
