"""What a model's training costs in floating-point operations, and what the machine can do.

The formula counts the matrix products that no implementation can leave out, all positions of the
head included, and takes no account of what a fast path skips: so it puts all sides on one scale.

Per token, with N the matrix parameters of blocks and head: full 6 N, LoRA 4 N (no gradients of
frozen weights), and three times the attention's forward, 2 x 2 x layers x heads x head size x
(length / 2) for causal attention within a sequence of that length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WEIGHT_PASSES = {"lora": 4, "qlora": 4, "full": 6}
"""Operations per token and matrix parameter."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the object in a model's config.json."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def matrices(self) -> int:
        """Parameters of all matrices that multiply activations: blocks and head, no embedding."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size
        return self.layers * self.hidden * (attention + 3 * self.inner) + self.head

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocabulary

    def step_flops(self, method: str, lengths: Iterable[int]) -> float:
        """Operations of a forward and backward over sequences of these lengths."""
        lengths = list(lengths)
        attention = sum(2 * self.layers * self.heads * self.head_size * n * n for n in lengths)
        return WEIGHT_PASSES[method] * self.matrices * sum(lengths) + 3.0 * attention


# Peak


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product found."""

    dtype: str
    flops_per_second: float
    product: str
    """Its sizes: rows x inner x columns."""


def product_sizes(shape: Shape, token_counts: Iterable[int]) -> list[tuple[int, int, int]]:
    """Large square products, and those of the model's layers."""
    layers = [
        (shape.hidden, shape.inner),
        (shape.inner, shape.hidden),
        (shape.hidden, shape.heads * shape.head_size),
        (shape.hidden, shape.vocabulary),
    ]
    squares = [(side, side, side) for side in (1024, 2048, 4096)]
    return squares + [(tokens, k, n) for tokens in token_counts for k, n in layers]


def measure_peak(
    dtype: str, sizes: Iterable[tuple[int, int, int]], *, device: str = "cpu", seconds: float = 0.5
) -> Peak:
    """The best of all sizes, each timed again and again for so many seconds; the best time counts.

    The second factor is transposed, as a linear layer's weight is, and the result is not allocated
    anew.
    """
    import torch

    best = Peak(dtype, 0.0, "none")
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=device).to(getattr(torch, dtype))
        right = torch.randn(columns, inner, device=device).to(getattr(torch, dtype))
        out = torch.empty(rows, columns, device=device, dtype=left.dtype)
        fastest = fastest_of(lambda: torch.mm(left, right.t(), out=out), seconds, device)  # noqa: B023
        rate = 2.0 * rows * inner * columns / fastest
        if rate > best.flops_per_second:
            best = Peak(dtype, rate, f"{rows} x {inner} x {columns}")
    return best


def fastest_of(call: Any, seconds: float, device: str) -> float:
    """Seconds of the fastest of many calls; the first two are warm-up."""
    import torch

    fastest, count, begun = float("inf"), 0, time.perf_counter()
    while count < 5 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        if count >= 2:
            fastest = min(fastest, time.perf_counter() - start)
        count += 1
    return fastest
