"""The nf4 format of QLoRA (arXiv 2305.14314) in slow and obvious form: what the stored bits mean.

A weight is cut into blocks of 64. Each block is divided by its largest magnitude, and each number
becomes the nearest of 16 levels: 4 bits, two to a byte. The magnitudes are quantized again, in
blocks of 256, to 8 bits (double quantization): 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.

Training reads this format with bitsandbytes' kernels (`model.quantize`); the tests compare the two.

Shape letters: O outputs, I inputs, N numbers of a flat tensor, B blocks of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64
"""Weights that share a magnitude."""
OUTER_BLOCK = 256
"""Magnitudes that share a magnitude of their own."""
BITS_PER_WEIGHT = 4 + 8 / BLOCK + 32 / (BLOCK * OUTER_BLOCK)

OFFSET = 0.9677083
"""Largest quantile, 1 - (1/32 + 1/30) / 2, with the digits that the published levels come from."""


@dataclass(frozen=True)
class Nf4:
    """A weight in nf4."""

    packed_N: torch.Tensor
    """Two level numbers to a byte, uint8; the first one is in the high half."""
    magnitude_B: torch.Tensor
    """Numbers of magnitudes in `dynamic_levels`, uint8."""
    outer_B: torch.Tensor
    """Largest magnitude of each outer block, fp32."""
    offset: torch.Tensor
    """Mean magnitude, taken off before the second quantization, an fp32 scalar."""
    shape: torch.Size


def nf4_levels() -> torch.Tensor:
    """The 16 levels, fp32, rising from -1 to 1 (arXiv 2305.14314, §3 and appendix E).

    They are quantiles of the standard normal distribution, 7 negative and 8 positive ones and an
    exact zero, divided by the largest.
    """
    # fp32 probabilities, fp64 quantiles, an fp32 division: the published digits, all of them.
    positive, negative = (
        torch.special.ndtri(torch.linspace(OFFSET, 0.5, count)[:-1].double()).float()
        for count in (9, 8)
    )
    levels = torch.cat([-negative, positive.new_zeros(1), positive.flip(0)])
    return levels / levels.max()


def dynamic_levels() -> torch.Tensor:
    """The 256 levels of magnitudes, fp32: a sign, a decimal exponent, and a linear fraction.

    The exponent's bits end at the first 1, so that small numbers have less of a fraction (dynamic
    tree quantization, arXiv 1511.04561 §1 and arXiv 2110.02861 §1.3).
    """
    levels = [torch.tensor([0.0, 1.0])]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2
        levels += [sign * 10.0 ** (bits - 6) * fractions for sign in (1, -1)]
    return torch.cat(levels).sort().values


def quantize_reference(weight_OI: torch.Tensor) -> Nf4:
    """Quantizes a weight whose size is a multiple of 64. A tie goes to the lower level."""
    blocks = weight_OI.float().reshape(-1, BLOCK)
    magnitude_B = blocks.abs().amax(1)
    numbers = _nearest(blocks, magnitude_B, nf4_levels()).flatten()
    offset = magnitude_B.mean()
    rest = (magnitude_B - offset).split(OUTER_BLOCK)
    outer_B = torch.stack([part.abs().max() for part in rest])
    codes = [
        _nearest(part[None], outer[None], dynamic_levels())[0]
        for part, outer in zip(rest, outer_B, strict=True)
    ]
    return Nf4(
        packed_N=(numbers[::2] << 4) | numbers[1::2],
        magnitude_B=torch.cat(codes),
        outer_B=outer_B,
        offset=offset,
        shape=weight_OI.shape,
    )


def dequantize_reference(stored: Nf4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight that was stored, computed in fp32 and rounded once."""
    codes = dynamic_levels()[stored.magnitude_B.long()]
    outer_B = stored.outer_B.repeat_interleave(OUTER_BLOCK)[: len(codes)]
    magnitude_B = codes * outer_B + stored.offset
    halves = torch.stack([stored.packed_N >> 4, stored.packed_N & 15], 1)
    blocks = nf4_levels()[halves.long()].reshape(-1, BLOCK) * magnitude_B[:, None]
    return blocks.reshape(stored.shape).to(dtype)


def _nearest(
    values_BN: torch.Tensor, magnitude_B: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """Number of the level next to each value over its block's magnitude, uint8."""
    # A product with the reciprocal, as in bitsandbytes: a division rounds otherwise now and then.
    # No smaller bound: 1e-38 is a denormal number, 0 in threads that flush them.
    scaled_BN = values_BN * (1 / magnitude_B.clamp(min=1e-30))[:, None]
    return torch.bucketize(scaled_BN, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
