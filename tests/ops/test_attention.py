import pytest
import torch

from tunesmith.ops.attention import attend, attend_reference
from tunesmith.types import Segments

MODULE = torch.nn.Identity()


def make_qkv(num_tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, 4, num_tokens, 8), (1, 2, num_tokens, 8), (1, 2, num_tokens, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    "lengths", [(7,), (1,), (5, 5, 5), (9, 4, 4, 1, 1), (1, 6, 1), (3, 2, 3, 2)]
)
def test_equals_the_block_mask_reference(lengths: tuple[int, ...]) -> None:
    segments = Segments(lengths)
    q, k, v = make_qkv(sum(lengths))
    out, weights = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3)
    expected = attend_reference(q, k, v, segments, 0.3)
    assert weights is None
    assert out.shape == (1, sum(lengths), 4, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    seed = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * seed).sum(), [q, k, v]),
        torch.autograd.grad((expected * seed).sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_window_and_softcap_equal_a_naive_loop(window: int, softcap: float | None) -> None:
    segments = Segments((6, 4))
    q, k, v = make_qkv(10)
    out, _ = attend(
        MODULE, q, k, v, None, segments=segments, scaling=0.5, sliding_window=window,
        softcap=softcap,
    )  # fmt: skip
    for start, stop in ((0, 6), (6, 10)):
        for token in range(start, stop):
            first = max(start, token - window + 1)
            for head in range(4):
                scores = k[0, head // 2, first : token + 1] @ q[0, head, token] * 0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                expected = scores.float().softmax(0).double() @ v[0, head // 2, first : token + 1]
                torch.testing.assert_close(out[0, token, head], expected, rtol=0, atol=1e-6)


def test_segments_do_not_see_each_other() -> None:
    segments = Segments((4, 3))
    q, k, v = make_qkv(7)
    before, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3)
    with torch.no_grad():
        k[:, :, :4] += 1
        v[:, :, :4] += 1
    after, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before[:, :4], after[:, :4])


def test_attention_sinks_are_refused() -> None:
    q, k, v = make_qkv(3)
    with pytest.raises(NotImplementedError, match="sinks"):
        attend(MODULE, q, k, v, None, segments=Segments((3,)), scaling=1.0, s_aux=torch.ones(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_equals_the_cpu_path(window: int | None) -> None:
    segments = Segments((9, 4, 4, 1))
    torch.manual_seed(0)
    shapes = [(1, 4, 18, 64), (1, 2, 18, 64), (1, 2, 18, 64)]
    qkv = [torch.randn(shape).bfloat16() for shape in shapes]
    kwargs = {"segments": segments, "scaling": 0.125, "sliding_window": window}
    expected, _ = attend(MODULE, *(x.double() for x in qkv), None, **kwargs)
    out, _ = attend(MODULE, *(x.cuda() for x in qkv), None, **kwargs)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)
