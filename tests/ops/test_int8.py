"""The int8 format against bitsandbytes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tunesmith.ops.int8 import (
    CHUNK_NUMBERS,
    dequantize_into,
    dequantize_reference,
    quantize_reference,
    scratch_numbers,
)


def weight(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return 0.05 * torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]


def made(codes_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out_OI = torch.full(codes_OI.shape, torch.nan, dtype=dtype)
    scratch_N = torch.empty(scratch_numbers(codes_OI))
    assert dequantize_into(out_OI, codes_OI, scale_O, scratch_N) is out_OI
    return out_OI


def test_an_error_is_half_a_step_at_most() -> None:
    original = weight(48, 96).half().float()
    codes, scale = quantize_reference(original)
    assert codes.abs().amax(1).eq(127).all()
    error = (dequantize_reference(codes, scale) - original).abs()
    assert (error <= scale[:, None] / 254 * 1.0001).all()


def test_a_row_of_zeros() -> None:
    original = weight(4, 8)
    original[2] = 0
    codes, scale = quantize_reference(original)
    assert scale[2] == 0
    assert torch.equal(dequantize_reference(codes, scale)[2], torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (300, 700), (1, 2 * CHUNK_NUMBERS["cpu"])])
def test_dequantizing_in_chunks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale = quantize_reference(weight(*shape))
    expected = dequantize_reference(codes, scale).to(dtype)
    assert torch.equal(made(codes, scale, dtype), expected)


def test_the_numbers_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    original = weight(300, 700)
    codes, scale, _ = functional.int8_vectorwise_quant(original.half())
    ours, our_scale = quantize_reference(original)
    assert torch.equal(our_scale, scale)
    assert torch.equal(ours, codes)
    expected = functional.int8_vectorwise_dequant(codes, scale)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(made(codes, scale, dtype), expected.to(dtype))
