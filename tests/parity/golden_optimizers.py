"""Writes tests/ops/optimizers.json: what the authors' own optimizers make of small matrices.

    PATH/TO/PYTHON tests/parity/golden_optimizers.py

needs galore_torch 1.0, apollo_torch 1.0.3 and badam 1.4 beside torch and transformers. Two things
are set from outside, because they are arbitrary: the signs of GaLore's singular vectors (the
largest number positive) and APOLLO's random projections.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from apollo_torch import APOLLOAdamW
from apollo_torch.random_projector import GradientProjector
from badam import BlockOptimizer
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector

GOLDEN = Path(__file__).resolve().parents[1] / "ops" / "optimizers.json"
SHAPES = [(4, 6), (6, 4), (5, 5)]
STEPS, EVERY, RATE = 7, 3, 0.01
LOW_RANK = {"rank": 2, "update_proj_gap": EVERY, "proj_type": "std"}


def numbers(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    """Numbers of a full-rank matrix that need no random generator."""
    index = torch.arange(shape[0] * shape[1], dtype=torch.float64)
    return torch.sin(index * index * 0.37 + phase).float().view(shape)


def projection(rows: int, columns: int, seed: int) -> torch.Tensor:
    return numbers((rows, columns), 10.0 + seed) / math.sqrt(rows)


def signed_svd(self: GaLoreProjector, matrix: torch.Tensor, rank: int, type: str) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    vectors = u[:, :rank] if type == "left" else v[:rank].T
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    return vectors if type == "left" else vectors.T


def given(
    self: GradientProjector, matrix: torch.Tensor, rank: int, type: str, seed: int
) -> torch.Tensor:
    found = projection(rank, min(matrix.shape), self.svd_count)
    self.svd_count += 1
    return found.T if type == "left" else found


def trained(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Any]:
    for step in range(STEPS):
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                parameter.grad = numbers(tuple(parameter.shape), 1.7 * step + index) * (1 + step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [parameter.detach().tolist() for parameter in parameters]


def fresh(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(numbers(shape, -1.0 - i)) for i, shape in enumerate(shapes)]


def low_rank(optimizer: type, **settings: object) -> list[Any]:
    parameters = fresh(SHAPES)
    group = {"params": parameters, **LOW_RANK, **settings}
    return trained(parameters, optimizer([group], lr=RATE, eps=1e-8))


def blocks() -> list[Any]:
    parameters = fresh([(3, 4)] * 3)
    named = [(f"layers.{index}.weight", p) for index, p in enumerate(parameters)]
    base = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    return trained(
        parameters,
        BlockOptimizer(base, named, switch_block_every=EVERY, switch_mode="ascending", verbose=0),
    )


def main() -> None:
    GaLoreProjector.get_orthogonal_matrix = signed_svd
    GradientProjector.get_orthogonal_matrix = given
    apollo = {"proj": "random", "scale_type": "channel", "scale": 1}
    golden = {
        "galore": low_rank(GaLoreAdamW, scale=0.25),
        "apollo": low_rank(APOLLOAdamW, **apollo),
        "apollo_mini": low_rank(
            APOLLOAdamW, **{**apollo, "rank": 1, "scale_type": "tensor", "scale": 128}
        ),
        "badam": blocks(),
    }
    lines = (f" {json.dumps(name)}: {json.dumps(weights)}" for name, weights in golden.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
