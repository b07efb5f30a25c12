"""The int8 format of LLM.int8() (arXiv 2208.07339, §2.1): what the stored numbers mean.

Each row of a weight, which makes one output, is divided by its largest magnitude, the scale, and
becomes whole numbers from -127 to 127: 8 bits a weight and 32 a row. The weight is in fp16 before.

bitsandbytes stores it so, the codes as `CB` and the scales as `SCB`; the tests compare bit for bit.
Only weights are in int8 here. The paper rounds a layer's inputs, too, for a product of integers;
training takes the dense weight, and its inputs stay as they are.

Shape letters: O outputs, I inputs, N numbers of a flat tensor.
"""

from __future__ import annotations

import torch

RECIPROCAL = 7.874015718698502e-3
"""1/127 with the digits that bitsandbytes multiplies by; in fp32 it is 1/127."""

CHUNK_NUMBERS = {"cpu": 2**16, "cuda": 2**22}
"""Products in fp32 before they are rounded: what stays in a core's cache, or in a GPU's. On one
AVX512 core 4096x4096 took 35 ms in these chunks, 53 in four times as large ones, 340 as a whole."""


def scratch_numbers(weight_OI: torch.Tensor) -> int:
    """Numbers of fp32 that `dequantize_into` needs to make bfloat16 or fp16."""
    return weight_OI.shape[1] * _rows(weight_OI)


def dequantize_into(
    out_OI: torch.Tensor, codes_OI: torch.Tensor, scale_O: torch.Tensor, scratch_N: torch.Tensor
) -> torch.Tensor:
    """The weight that was stored, computed in fp32 and rounded once; nothing is allocated.

    Args:
        out_OI: takes the result, of fp32, bfloat16 or fp16.
        codes_OI: int8.
        scale_O: largest magnitudes, fp32.
        scratch_N: fp32, of `scratch_numbers`; not used if the result is fp32.
    """
    scale_O1 = scale_O[:, None]
    if out_OI.dtype == torch.float32:
        return torch.mul(codes_OI, scale_O1, out=out_OI).mul_(RECIPROCAL)
    rows = _rows(codes_OI)
    for start in range(0, len(codes_OI), rows):
        part_OI = codes_OI[start : start + rows]
        product_OI = scratch_N[: part_OI.numel()].view(part_OI.shape)
        torch.mul(part_OI, scale_O1[start : start + rows], out=product_OI).mul_(RECIPROCAL)
        out_OI[start : start + rows].copy_(product_OI)
    return out_OI


def quantize_reference(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight. A tie goes to the even code; a row of zeros is zeros."""
    half_OI = weight_OI.half()
    scale_O = half_OI.abs().amax(1).float()
    # A product with the quotient, as in bitsandbytes: a division rounds otherwise now and then.
    codes_OI = (half_OI * (127.0 / scale_O)[:, None]).nan_to_num(0.0).round()
    return codes_OI.to(torch.int8), scale_O


def dequantize_reference(codes_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """The weight that was stored, in fp32: the slow and obvious form of `dequantize_into`."""
    return codes_OI.float() * scale_O[:, None] * RECIPROCAL


def _rows(weight_OI: torch.Tensor) -> int:
    num_outputs, num_inputs = weight_OI.shape
    chunk = CHUNK_NUMBERS.get(weight_OI.device.type, CHUNK_NUMBERS["cuda"])
    return min(num_outputs, max(1, chunk // num_inputs))
