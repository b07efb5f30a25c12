"""How far two ways of computing the same are apart."""

from __future__ import annotations

import torch


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float32 or wider."""
    wide = torch.promote_types(found.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).norm()
    return float(difference / expected.to(wide).norm().clamp_min(1e-30))
