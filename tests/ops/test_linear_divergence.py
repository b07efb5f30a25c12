"""The divergence of two heads, chunk by chunk, against full logits and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.objectives.preference_losses import kl_rows
from tunesmith.ops import linear_divergence as module
from tunesmith.ops.linear_divergence import Blend, Found, linear_divergence

BLENDS = {
    "forward": Blend("forward"),
    "reverse": Blend("reverse", temperature=2.0),
    "jsd": Blend("jsd", teacher_share=0.3),
    "forward with sft": Blend("forward", temperature=0.7, sft_weight=0.25),
    "jsd with sft": Blend("jsd", sft_weight=0.5),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 3.0, "scale": 0.5},
}


def make_inputs(
    dtype: torch.dtype = torch.float64, rows: int = 11, vocabulary: int = 23
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "hidden_NH": torch.randn(rows, 6, dtype=dtype),
        "weight_VH": torch.randn(vocabulary, 6, dtype=dtype),
        "bias_V": torch.randn(vocabulary, dtype=dtype),
        "target_N": torch.randint(0, vocabulary - 3, (rows,)),
        "weight_N": torch.rand(rows, dtype=torch.float64),
        "teacher_NV": 2 * torch.randn(rows, vocabulary - 3, dtype=dtype),
    }


def slow(inputs: dict[str, torch.Tensor], blend: Blend, **form: Any) -> Found:
    """Full logits, `kl_rows` and torch's cross-entropy."""
    size = inputs["teacher_NV"].shape[1]
    y_NV = (inputs["hidden_NH"] @ inputs["weight_VH"].T + inputs["bias_V"])[:, :size]
    y_NV = y_NV * form.get("scale", 1.0)
    if "softcap" in form:
        y_NV = form["softcap"] * torch.tanh(y_NV / form["softcap"])
    loss_N = kl_rows(
        y_NV, inputs["teacher_NV"], blend.kind,
        temperature=blend.temperature, teacher_share=blend.teacher_share,
    )  # fmt: skip
    plain_N = torch.nn.functional.cross_entropy(y_NV, inputs["target_N"], reduction="none")
    loss_N = (1 - blend.sft_weight) * loss_N + blend.sft_weight * plain_N
    kl_N = kl_rows(y_NV, inputs["teacher_NV"], temperature=blend.temperature)
    same_N = (y_NV.argmax(-1) == inputs["teacher_NV"].argmax(-1)).double()
    return Found(*((x * inputs["weight_N"]).sum() for x in (loss_N, kl_N, same_N)))


def fast(inputs: dict[str, torch.Tensor], blend: Blend, chunk_bytes: int, **form: Any) -> Found:
    return linear_divergence(
        inputs["hidden_NH"], inputs["weight_VH"], inputs["target_N"], inputs["weight_N"],
        lambda rows: inputs["teacher_NV"][rows],
        blend=blend, size=inputs["teacher_NV"].shape[1], bias_V=inputs["bias_V"],
        chunk_bytes=chunk_bytes, **form,
    )  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [8 * 20 * 3, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BLENDS)
def test_sums_and_gradients_equal_the_slow_way(
    name: str, form: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's vocabulary is smaller by three, as padded heads are; blocks of two rows."""
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 4 * 20 * 2)
    inputs = make_inputs()
    trained = [inputs[key].requires_grad_() for key in ("hidden_NH", "weight_VH", "bias_V")]
    expected = slow(inputs, BLENDS[name], **FORMS[form])
    wanted = torch.autograd.grad(3 * expected.loss_sum, trained)
    found = fast(inputs, BLENDS[name], chunk_bytes, **FORMS[form])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not found.kl_sum.requires_grad
    grads = torch.autograd.grad(3 * found.loss_sum, trained)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BLENDS)
def test_bfloat16_is_near(name: str) -> None:
    inputs = make_inputs()
    trained = [inputs[key].requires_grad_() for key in ("hidden_NH", "weight_VH")]
    expected = slow(inputs, BLENDS[name])
    wanted = torch.autograd.grad(expected.loss_sum, trained)
    half = {
        key: value.detach().bfloat16() if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    trained = [half[key].requires_grad_() for key in ("hidden_NH", "weight_VH")]
    found = fast(half, BLENDS[name], 1 << 20)
    grads = torch.autograd.grad(found.loss_sum, trained)
    assert found.loss_sum.dtype == torch.float32
    assert found.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours.double() - theirs).norm() < 0.05 * theirs.norm()


def test_no_rows_cost_nothing_and_no_grad_makes_none() -> None:
    inputs = make_inputs(rows=0)
    hidden = inputs["hidden_NH"].requires_grad_()
    found = fast(inputs, Blend(), 1 << 20)
    found.loss_sum.backward()
    assert found.loss_sum.item() == 0.0
    assert hidden.grad is not None
    inputs = make_inputs()
    inputs["hidden_NH"].requires_grad_()
    with torch.no_grad():
        measured = fast(inputs, Blend(), 1 << 20)
    assert not measured.loss_sum.requires_grad
    torch.testing.assert_close(measured.loss_sum, slow(inputs, Blend()).loss_sum.detach())


def test_the_gradients_run_back_once() -> None:
    inputs = make_inputs()
    inputs["hidden_NH"].requires_grad_()
    found = fast(inputs, Blend(), 1 << 20)
    found.loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.loss_sum.backward()
