"""How an optimizer's moments are kept: as float32, as bfloat16, or as 8-bit codes by blocks.

All of them are flat: one row of numbers for all parameters of a group. Each is read and written in
parts as float32, so that wide temporaries stay small.

Shape letters: P numbers in a part, B blocks of 256 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch

StateKind = Literal["float32", "bfloat16", "int8"]

BLOCK = 256
"""Numbers that share one scale in 8-bit states (arXiv 2110.02861 takes 2,048; in smaller blocks an
outlier spoils fewer others), and what every parameter's place in a flat buffer is aligned to."""


class Moment(Protocol):
    """A running average of the gradient or of its square."""

    def read(self, part: slice) -> torch.Tensor:
        """The numbers of a part, `P` in float32; a new tensor or a view."""
        ...

    def write(
        self, part: slice, values_P: torch.Tensor, is_kept: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Stores new numbers in a part, or leaves the old ones where `is_kept` is true."""
        ...

    def tensors(self, part: slice) -> dict[str, torch.Tensor]:
        """Views of what is stored for a part, by a suffix of the name; `""` is the numbers."""
        ...


class PlainMoment:
    """A moment in float32, or in bfloat16 with stochastic rounding.

    Rounded to nearest in bfloat16 the second moment would stand still: with beta2 0.999 a step
    takes 0.1 % off it, and neighbors in bfloat16 are 0.4 to 0.8 % apart.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def read(self, part: slice) -> torch.Tensor:
        """The numbers of a part, `P`."""
        return self.values[part].float()

    def write(
        self, part: slice, values_P: torch.Tensor, is_kept: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Stores numbers, bfloat16 ones rounded stochastically."""
        store(self.values[part], values_P, is_kept, generator)

    def tensors(self, part: slice) -> dict[str, torch.Tensor]:
        """The numbers themselves."""
        return {"": self.values[part]}


class Int8Moment:
    """A moment in 8-bit codes with one float32 scale for 256 numbers (arXiv 2110.02861, §2).

    One departure: a positive second moment is never rounded to 0, which would divide the step by
    epsilon alone; it becomes the smallest code, and that step is too small rather than too large.
    """

    def __init__(self, size: int, device: torch.device, *, is_signed: bool) -> None:
        self.is_signed = is_signed
        self.table = code_table(is_signed=is_signed).to(device)
        zero = int(torch.searchsorted(dynamic_map(is_signed=is_signed), 0.0))
        self.codes = torch.full((size,), zero, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(size // BLOCK, device=device)

    def read(self, part: slice) -> torch.Tensor:
        """The numbers of a part, `P`; parts begin and end with blocks."""
        return dequantize(self.codes[part], self.scales[_blocks(part)], self.table)

    def write(
        self, part: slice, values_P: torch.Tensor, is_kept: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Stores numbers as the nearest codes."""
        codes_P, scale_B = quantize(values_P, self.table)
        if not self.is_signed:
            codes_P = torch.maximum(codes_P, (values_P > 0).to(torch.uint8))
        for old, new in ((self.codes[part], codes_P), (self.scales[_blocks(part)], scale_B)):
            torch.where(is_kept, old, new, out=old)

    def tensors(self, part: slice) -> dict[str, torch.Tensor]:
        """Codes and scales; a last block that is not full still has its scale."""
        return {"": self.codes[part], ".scale": self.scales[_blocks(part)]}


def new_moment(kind: StateKind, size: int, device: torch.device, *, is_signed: bool) -> Moment:
    """A moment of zeros; the second one has no sign."""
    if kind == "int8":
        return Int8Moment(size, device, is_signed=is_signed)
    return PlainMoment(size, getattr(torch, kind), device)


def moment_tensors(
    moment: Moment, field: str, parts: Iterable[tuple[str, torch.Tensor, slice]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a moment holds of each parameter, as `<parameter>.<field>` and a view.

    Args:
        moment: of all parameters.
        field: its name.
        parts: name, parameter, and its place.
    """
    for name, parameter, place in parts:
        for suffix, stored in moment.tensors(place).items():
            shape = stored.shape if suffix else parameter.shape
            yield f"{name}.{field}{suffix}", stored.view(shape)


def bytes_per_number(kind: StateKind) -> float:
    """Of a moment."""
    return {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / BLOCK}[kind]


def store(
    target_P: torch.Tensor,
    values_P: torch.Tensor,
    is_kept: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Writes float32 numbers into a float32 or bfloat16 tensor, unless `is_kept`.

    In bfloat16 they are rounded stochastically. A scalar on the device decides, so that a step
    with bad numbers is undone without asking the device for them.
    """
    if target_P.dtype == torch.bfloat16:
        values_P = round_stochastically(values_P, generator)
    torch.where(is_kept, target_P, values_P, out=target_P)


def round_stochastically(values_P: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 to one of its two bfloat16 neighbors, right on average (arXiv 2010.06192).

    The lower 16 bits of a float32 are what bfloat16 drops: a random number below 2^16 added to them
    carries into the upper ones with just the probability of rounding away from 0. Infinities stay;
    NaN is not covered.
    """
    bits_P = values_P.contiguous().view(torch.int32)
    # One draw of 64 bits serves four numbers: 0.9 ns each on CPU, where randint takes 3.6.
    draws = torch.empty(-(-bits_P.numel() // 4), dtype=torch.int64, device=bits_P.device)
    draws.random_(-(2**63), None, generator=generator)
    noise_P = draws.view(torch.int16)[: bits_P.numel()].to(torch.int32).add_(2**15)
    # The mask clears the lower half, so that the cast rounds nothing more.
    rounded_P = noise_P.add_(bits_P).bitwise_and_(-(2**16))
    return rounded_P.view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class CodeTable:
    """The numbers that 8-bit codes stand for, and what finds the nearest one fast.

    Bisection costs 150 ns a number on CPU. The upper half of a float32 (sign, exponent, 7 bits)
    leaves at most one middle between neighbors open, so two look-ups and a comparison decide:
    5 ns, and the same codes.

    Args:
        numbers: the 256 numbers, rising.
        middles: between each of them and the next; infinity behind the last.
        lowest: for each upper half, the code of the smallest number that has it, uint8.
    """

    numbers: torch.Tensor
    middles: torch.Tensor
    lowest: torch.Tensor

    def to(self, device: torch.device) -> CodeTable:
        """The same on another device."""
        return CodeTable(self.numbers.to(device), self.middles.to(device), self.lowest.to(device))

    def nearest(self, values_P: torch.Tensor) -> torch.Tensor:
        """The codes of the nearest numbers, `P` uint8; values in [-1, 1]."""
        upper_P = values_P.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        lowest_P = self.lowest.index_select(0, upper_P)
        middle_P = self.middles.index_select(0, lowest_P.int())
        return lowest_P.add_(values_P > middle_P)


@cache
def code_table(*, is_signed: bool) -> CodeTable:
    """The table of `dynamic_map`, on CPU."""
    numbers = dynamic_map(is_signed=is_signed)
    middles = (numbers[1:] + numbers[:-1]) / 2
    upper = torch.arange(2**16, dtype=torch.int32).bitwise_left_shift(16)
    # Of negative numbers with the same upper half the longest lower half is the smallest.
    smallest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    lowest = torch.bucketize(smallest.nan_to_num(1.0), middles).to(torch.uint8)
    return CodeTable(numbers, torch.cat((middles, torch.tensor([float("inf")]))), lowest)


def dynamic_map(*, is_signed: bool) -> torch.Tensor:
    """The 256 numbers in [-1, 1] or [0, 1] that 8-bit codes stand for, rising (arXiv 2110.02861).

    Dynamic tree quantization (§2.1 there; Dettmers, arXiv 1511.04561): the leading zero bits of a
    code count its power of ten, from 10^-6 to 1, and what bits are left divide (0.1, 1] of that
    power evenly. Without a sign there is one bit more to divide it. 0 and 1 are exact.
    """
    numbers: list[float] = [0.0, 1.0]
    for power in range(7):
        count = 2 ** (power if is_signed else power + 1)
        width = 0.9 / count
        centers = [(0.1 + width * (index + 0.5)) * 10.0 ** (power - 6) for index in range(count)]
        numbers += centers
        if is_signed:
            numbers += [-center for center in centers]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def quantize(values_P: torch.Tensor, table: CodeTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers as the nearest codes of a table, block by block.

    Returns:
        (codes `P` uint8, scales `B` float32: the largest magnitude in each block).
    """
    blocks_BK = _as_blocks(values_P)
    scale_B = blocks_BK.abs().amax(1)
    normal_BK = blocks_BK / torch.where(scale_B > 0, scale_B, 1)[:, None]
    return table.nearest(normal_BK.view(-1))[: values_P.numel()], scale_B


def dequantize(codes_P: torch.Tensor, scale_B: torch.Tensor, table: CodeTable) -> torch.Tensor:
    """The numbers `P` that codes stand for."""
    numbers_BK = _as_blocks(table.numbers.index_select(0, codes_P.int()))
    return (numbers_BK * scale_B[:, None]).view(-1)[: codes_P.numel()]


def _as_blocks(values_P: torch.Tensor) -> torch.Tensor:
    missing = -values_P.numel() % BLOCK
    return torch.nn.functional.pad(values_P, (0, missing)).view(-1, BLOCK)


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
