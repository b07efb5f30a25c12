"""The nf4 format against the published numbers and against bitsandbytes, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.ops.nf4 import (
    BITS_PER_WEIGHT,
    Nf4,
    dequantize_reference,
    dynamic_levels,
    nf4_levels,
    quantize_reference,
)

# arXiv 2305.14314, appendix E.
PUBLISHED = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@pytest.fixture(scope="module")
def functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape) * 0.02


def test_levels_are_the_published_ones() -> None:
    assert torch.equal(nf4_levels(), torch.tensor(PUBLISHED))


def test_dynamic_levels_are_256_different_ones() -> None:
    levels = dynamic_levels()
    assert len(levels.unique()) == len(levels) == 256
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1


def test_bits_per_weight() -> None:
    stored = quantize_reference(weight(512, 1024))
    parts = (stored.packed_N, stored.magnitude_B, stored.outer_B, stored.offset)
    num_bytes = sum(part.numel() * part.element_size() for part in parts)
    assert 8 * num_bytes / (512 * 1024) == pytest.approx(BITS_PER_WEIGHT, abs=1e-4)
    assert pytest.approx(4.127, abs=5e-4) == BITS_PER_WEIGHT


def test_error_is_at_most_half_a_step() -> None:
    """The widest gap between levels is 0.304 (from -1 to -0.696) of a block's magnitude."""
    original = weight(256, 192)
    restored = dequantize_reference(quantize_reference(original))
    magnitude = original.reshape(-1, 64).abs().amax(1, keepdim=True)
    error = ((restored - original).reshape(-1, 64) / magnitude).abs()
    assert error.max() < 0.304 / 2 + 0.02  # the second quantization's own error
    assert 0.05 < error.square().mean().sqrt() / (original.std() / magnitude.mean()) < 0.15


def test_dtype_is_rounded_once() -> None:
    stored = quantize_reference(weight(64, 64))
    assert torch.equal(
        dequantize_reference(stored, torch.bfloat16), dequantize_reference(stored).bfloat16()
    )


def of_bitsandbytes(packed: torch.Tensor, state: Any) -> Nf4:
    return Nf4(packed.flatten(), state.absmax, state.state2.absmax, state.offset, state.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (96, 1536), (3, 64)])
def test_bitsandbytes_stores_the_same_bits(
    functional: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    original = weight(*shape).to(dtype)
    ours = quantize_reference(original)
    packed, state = functional.quantize_4bit(original, compress_statistics=True, quant_type="nf4")
    theirs = of_bitsandbytes(packed, state)
    assert torch.equal(ours.packed_N, theirs.packed_N)
    assert torch.equal(ours.offset, theirs.offset)
    assert torch.equal(ours.outer_B, theirs.outer_B)
    assert torch.equal(dynamic_levels(), state.state2.code)
    # Its CPU kernel takes the second nearest of the 256 levels for about one magnitude in 1,500.
    differs = ours.magnitude_B != theirs.magnitude_B
    assert differs.float().mean() < 0.005
    assert (ours.magnitude_B.int() - theirs.magnitude_B.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_reads_the_same_numbers(functional: Any, dtype: torch.dtype) -> None:
    original = weight(192, 576).to(dtype)
    packed, state = functional.quantize_4bit(original, compress_statistics=True, quant_type="nf4")
    ours = dequantize_reference(of_bitsandbytes(packed, state), dtype)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("flushes", [False, True])
def test_a_block_of_zeros(flushes: bool) -> None:
    """Also in threads that flush denormal numbers, where bitsandbytes 0.50 divides 0 by 0."""
    original = weight(2, 64)
    original[0] = 0
    torch.set_flush_denormal(flushes)
    try:
        restored = dequantize_reference(quantize_reference(original))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(restored[0], torch.zeros(64))
