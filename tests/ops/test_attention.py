from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.ops import attention, products, tiles
from tunesmith.ops.attention import attend, attend_packed, attend_reference
from tunesmith.ops.kept import Kept
from tunesmith.types import Segments

MODULE = torch.nn.Identity()


def make_qkv(
    num_tokens: int, dtype: torch.dtype = torch.float64, heads: tuple[int, int] = (4, 2)
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, count, num_tokens, 8) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check(
    segments: Segments, *, window: int | None = None, heads: tuple[int, int] = (4, 2)
) -> None:
    """Output and gradients equal the reference's, in fp64."""
    q, k, v = make_qkv(sum(segments.lengths), heads=heads)
    out, weights = attend(
        MODULE, q, k, v, None, segments=segments, scaling=0.3, sliding_window=window
    )
    expected = attend_reference(q, k, v, segments, 0.3, window)
    assert weights is None
    assert out.shape == (1, sum(segments.lengths), heads[0], 8) and out.is_contiguous()
    seed = torch.randn_like(out)
    gradients = torch.autograd.grad((expected * seed).sum(), [q, k, v])
    by_head = [x[0].transpose(0, 1) for x in (q, k, v)]
    tiled = products.TileAttention.apply(*by_head, segments, 0.3, window)[None]
    for found in (out, tiled):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad((found * seed).sum(), [q, k, v]), gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


LENGTHS = [(7,), (1,), (5, 5, 5), (9, 4, 4, 1, 1), (1, 6, 1), (70, 35, 33, 32, 31, 3, 64)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (3, 1)])
def test_equals_the_block_mask_reference(lengths: tuple[int, ...], heads: tuple[int, int]) -> None:
    check(Segments(lengths), heads=heads)


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("block", [tiles.BLOCK, 32])
def test_blocks_of_long_segments(
    monkeypatch: pytest.MonkeyPatch, block: int, window: int | None
) -> None:
    monkeypatch.setattr(tiles, "BLOCK", block)
    check(Segments((700 if block > 32 else 150, 40, 1)), window=window)


TREES = {
    "one prefix": Segments((10, 5, 6, 7), (-1, 0, 0, -1)),
    "two levels": Segments((10, 5, 1, 7, 3, 40), (-1, 0, 1, 1, 0, 0)),
    "three levels, two trees": Segments((3, 2, 1, 4, 4, 33, 2, 2), (-1, 0, 1, 2, 2, -1, 5, 5)),
    "of a child longer than a block": Segments((50, 90, 90, 20), (-1, 0, 0, 0)),
    "a prefix longer than a block": Segments((80, 9, 9, 9, 9, 9), (-1, 0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("window", [None, 1, 8, 60])
@pytest.mark.parametrize("segments", TREES.values(), ids=TREES.keys())
def test_shared_prefixes(
    monkeypatch: pytest.MonkeyPatch, segments: Segments, window: int | None
) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 32)
    check(Segments(segments.lengths, segments.parents), window=window)


def test_shared_is_the_same_as_repeated() -> None:
    """A prefix of three children, against three sequences with the prefix in each."""
    q, k, v = make_qkv(12)
    shared = Segments((5, 3, 2, 2), (-1, 0, 0, 0))
    rows = [[*range(5), 5, 6, 7], [*range(5), 8, 9], [*range(5), 10, 11]]
    flat = [row for one in rows for row in one]
    out, _ = attend(MODULE, q, k, v, None, segments=shared, scaling=0.3)
    repeated, _ = attend(
        MODULE, *(x[:, :, flat] for x in (q, k, v)), None, segments=Segments((8, 7, 7)), scaling=0.3
    )
    torch.testing.assert_close(out[:, flat], repeated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("long", [products.LONG, 100])
@pytest.mark.parametrize("parents", [(), (-1, 0, 0, -1, -1)])
def test_half_precision_errs_no_more_than_eager_attention(
    monkeypatch: pytest.MonkeyPatch, parents: tuple[int, ...], long: int
) -> None:
    """Eager: products in bfloat16, softmax in fp32, as in transformers."""
    monkeypatch.setattr(products, "LONG", long)
    segments = Segments((300, 90, 60, 60, 60), parents)
    torch.manual_seed(0)
    shapes = [(1, 4, 570, 32), (1, 2, 570, 32), (1, 2, 570, 32), (1, 570, 4, 32)]
    full = [torch.randn(shape).bfloat16().float() for shape in shapes]
    seed = full.pop()
    for x in full:
        x.requires_grad_()
    half = [x.detach().bfloat16().requires_grad_() for x in full]
    again = [x.detach().clone().requires_grad_() for x in half]

    exact = attend_reference(*full, segments, 0.18)
    ours, _ = attend(MODULE, *half, None, segments=segments, scaling=0.18)
    eager = attend_reference(*again, segments, 0.18)
    assert ours.dtype == torch.bfloat16
    grads = [
        [out.detach(), *torch.autograd.grad((out * seed.to(out.dtype)).sum(), inputs)]
        for out, inputs in ((exact, full), (ours, half), (eager, again))
    ]
    for true, found, plain in zip(*grads, strict=True):
        error, allowed = ((x.float() - true).norm() for x in (found, plain))
        assert error <= 1.5 * allowed


def test_autocast_gives_its_dtype() -> None:
    segments = Segments((6, 4))
    q, k, v = make_qkv(10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(MODULE, q, k, v.bfloat16(), None, segments=segments, scaling=0.3)
        wide, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3)
    assert out.dtype == wide.dtype == torch.bfloat16
    assert torch.equal(out, wide)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_values_may_be_of_another_size() -> None:
    segments = Segments((10, 5, 6), (-1, 0, 0))
    q, k, _ = make_qkv(21)
    v = torch.randn(1, 2, 21, 5, dtype=torch.float64)
    out, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3)
    expected = attend_reference(q, k, v, segments, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_tables_are_made_once_per_batch() -> None:
    segments = Segments((10, 5))
    q, k, v = make_qkv(15)
    attend(MODULE, q, k, v, None, segments=segments, scaling=0.3, sliding_window=4)
    kept = dict(segments.memo)
    attend(MODULE, q, k, v, None, segments=segments, scaling=0.3, sliding_window=4)
    assert len(kept) == 1 and all(segments.memo[key] is value for key, value in kept.items())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=30), st.none() | st.integers(1, 300))
def test_stacks(lengths: list[int], window: int | None) -> None:
    """Every row once, in few shapes, with little padding."""
    stacks = tiles.stacks_of(tiles.tiles_of(Segments(tuple(lengths)), window))
    found = [t for stack in stacks for t in stack.tiles]
    rows = sorted(row for t in found for row in range(t.start, t.start + t.length))
    assert rows == list(range(sum(lengths)))
    for stack in stacks:
        assert len(stack.tiles).bit_count() == 1
        assert stack.num_rows % tiles.STEP == stack.num_keys % tiles.STEP == 0
        for t in stack.tiles:
            assert t.num_before == stack.num_before <= (window or 600)
            assert 0 <= stack.num_rows - t.length < max(tiles.STEP, stack.num_rows // 4)


def test_varlen_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    (call,) = attention.varlen_calls(Segments((4, 3)), 64, cpu)
    assert call.keys is None and call.rows == (0, 7)
    assert call.cumulative_rows.tolist() == call.cumulative_keys.tolist() == [0, 4, 7]
    (call,) = attention.varlen_calls(Segments((4, 3, 2), (-1, 0, 1)), 64, cpu)
    assert call.keys is not None
    assert call.keys.tolist() == [0, 1, 2, 3, *range(7), *range(9)]
    assert call.cumulative_keys.tolist() == [0, 4, 11, 20]
    assert (call.longest_rows, call.longest_keys) == (4, 9)
    monkeypatch.setattr(attention, "MOST_VARLEN_NUMBERS", 300 * 64)
    calls = attention.varlen_calls(Segments((4, 3, 2), (-1, 0, -1)), 64, cpu)
    assert [one.rows for one in calls] == [(0, 7), (7, 9)]
    assert calls[1].keys is None and calls[1].cumulative_rows.tolist() == [0, 2]


def slow_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch's varlen attention computes: causal from the lower right corner."""
    assert enable_gqa and window_size[1] == 0
    pieces: list[torch.Tensor] = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert b - a <= max_q and d - c <= max_k
        keys, values = (x[c:d].repeat_interleave(2, dim=1).transpose(0, 1) for x in (k, v))
        back = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = (back < 0) | (back > window_size[0]) & (window_size[0] >= 0)
        scores = q[a:b].transpose(0, 1) @ keys.transpose(1, 2) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        pieces.append((weights @ values).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("most", [2**31, 150 * 32])
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("segments", [Segments((4, 3)), *TREES.values()])
def test_calls_of_varlen_attention(
    monkeypatch: pytest.MonkeyPatch, segments: Segments, window: int | None, most: int
) -> None:
    monkeypatch.setattr(attention, "MOST_VARLEN_NUMBERS", most)
    monkeypatch.setattr(attention, "_fits_varlen", lambda q, v: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    segments = Segments(segments.lengths, segments.parents)
    q, k, v = make_qkv(sum(segments.lengths))
    out, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.3, sliding_window=window)
    expected = attend_reference(q, k, v, segments, 0.3, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), [q, k, v]),
        torch.autograd.grad(expected.square().sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def slow_flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
    max_q: int, max_k: int, dropout: float, is_causal: bool, wants_mask: bool, *, scale: float,
    window_size_left: int, window_size_right: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    assert dropout == 0 and not wants_mask and is_causal == (window_size_left == -1)
    out = slow_varlen(
        q, k, v, cu_q, cu_k, max_q, max_k,
        scale=scale, window_size=(window_size_left, window_size_right), enable_gqa=True,
    )  # fmt: skip
    return out, out.sum(-1).T, torch.zeros(2), torch.zeros(()), torch.zeros(0)


def slow_flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    logsum: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    dropout: float, is_causal: bool, random_state: torch.Tensor, unused: torch.Tensor, *,
    scale: float, window_size_left: int, window_size_right: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, of_sums, *_ = slow_flash_forward(
            *inputs, cu_q, cu_k, max_q, max_k, dropout, is_causal, False,
            scale=scale, window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
    assert torch.equal(out, again) and torch.equal(logsum, of_sums)
    return torch.autograd.grad(again, inputs, grad)


@pytest.mark.parametrize("most", [2**31, 150 * 32])
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("segments", [Segments((4, 3)), *TREES.values()])
def test_kept_varlen_attention(
    monkeypatch: pytest.MonkeyPatch, segments: Segments, window: int | None, most: int
) -> None:
    """The second pass runs no forward kernel; the first one's output has no history in `Kept`."""
    runs: list[int] = []
    monkeypatch.setattr(attention, "MOST_VARLEN_NUMBERS", most)
    monkeypatch.setattr(attention, "_fits_varlen", lambda q, v: True)
    forward, backward = "_flash_attention_forward", "_flash_attention_backward"
    monkeypatch.setattr(
        torch.ops.aten, forward, lambda *a, **k: (runs.append(1), slow_flash_forward(*a, **k))[1]
    )
    monkeypatch.setattr(torch.ops.aten, backward, slow_flash_backward)
    segments, kept = Segments(segments.lengths, segments.parents), Kept()
    qkv = [x[0].transpose(0, 1) for x in make_qkv(sum(segments.lengths))]
    kwargs = {"segments": segments, "scaling": 0.3, "window": window, "kept": kept}
    found = [attend_packed(*qkv, **kwargs) for _ in range(2)]
    assert len(runs) == len(attention.varlen_calls(segments, 32, qkv[0].device))
    assert torch.equal(*found)
    inputs = [x.transpose(0, 1)[None] for x in qkv]
    expected = attend_reference(*inputs, segments, 0.3, window)[0]
    true = torch.autograd.grad(expected.square().sum(), qkv)
    for out in found:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(out.square().sum(), qkv), true, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("parents", [(), (-1, 0, 0, -1)])
def test_kept_varlen_attention_calls_torch_rightly(
    monkeypatch: pytest.MonkeyPatch, window: int | None, parents: tuple[int, ...]
) -> None:
    """Against the signatures and shapes of torch's operations, without data."""
    monkeypatch.setattr(attention, "_fits_varlen", lambda q, v: True)
    monkeypatch.setattr(attention, "_working_dtype", lambda v: v.dtype)  # meta has no autocast
    shapes = [(18, 4, 64), (18, 2, 64), (18, 2, 64)]
    with torch.device("meta"):
        qkv = [torch.empty(x, dtype=torch.bfloat16, requires_grad=True) for x in shapes]
    segments = Segments((9, 4, 4, 1), parents)
    out = attend_packed(*qkv, segments, scaling=0.1, window=window, kept=Kept())
    grads = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in qkv]


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


@pytest.mark.parametrize("window", [None, 3, 100])
def test_softcap_over_a_shared_prefix(window: int | None) -> None:
    """Against the same tokens as sequences of their own."""
    q, k, v = make_qkv(11)
    flat = [*range(8), *range(4), 8, 9, 10]
    kwargs = {"scaling": 0.5, "softcap": 2.0, "sliding_window": window}
    shared = Segments((4, 4, 3), (-1, 0, 0))
    out, _ = attend(MODULE, q, k, v, None, segments=shared, **kwargs)
    many = [x[:, :, flat] for x in (q, k, v)]
    expected, _ = attend(MODULE, *many, None, segments=Segments((8, 7)), **kwargs)
    torch.testing.assert_close(out[:, flat], expected, rtol=0, atol=1e-12)


def test_dropout_keeps_the_mean() -> None:
    segments = Segments((6, 4))
    q, k, v = make_qkv(10)
    torch.manual_seed(1)
    draws = [
        attend(MODULE, q, k, v, None, segments=segments, scaling=0.5, dropout=0.2)[0].detach()
        for _ in range(300)
    ]
    expected, _ = attend(MODULE, q, k, v, None, segments=segments, scaling=0.5)
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, rtol=0, atol=0.25)


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
@pytest.mark.parametrize("parents", [(), (-1, 0, 0, -1)])
def test_varlen_equals_the_cpu_path(window: int | None, parents: tuple[int, ...]) -> None:
    segments = Segments((9, 4, 4, 1), parents)
    torch.manual_seed(0)
    shapes = [(1, 4, 18, 64), (1, 2, 18, 64), (1, 2, 18, 64)]
    qkv = [torch.randn(shape).bfloat16() for shape in shapes]
    kwargs = {"segments": segments, "scaling": 0.125, "sliding_window": window}
    expected, _ = attend(MODULE, *(x.double() for x in qkv), None, **kwargs)
    out, _ = attend(MODULE, *(x.cuda() for x in qkv), None, **kwargs)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("parents", [(), (-1, 0, 0, -1)])
def test_kept_varlen_equals_varlen(window: int | None, parents: tuple[int, ...]) -> None:
    """Outputs bit for bit; flash adds up the gradient of queries in any order."""
    segments, kept = Segments((90, 40, 40, 10), parents), Kept()
    torch.manual_seed(0)
    shapes = [(180, 4, 64), (180, 2, 64), (180, 2, 64)]
    qkv = [torch.randn(x, device="cuda").bfloat16().requires_grad_() for x in shapes]
    outs = [
        attend_packed(*qkv, segments, scaling=0.125, window=window, kept=each)
        for each in (None, kept, kept)
    ]
    seed = torch.randn_like(outs[0])
    expected, *found = ([out, *torch.autograd.grad(out, qkv, seed)] for out in outs)
    for each in found:
        assert torch.equal(each[0], expected[0])
        for ours, theirs in zip(each[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
