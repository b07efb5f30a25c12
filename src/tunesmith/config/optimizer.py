"""The recipe's `train.optimizer`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.base import Strict


class OptimizerConfig(Strict):
    """How weights are updated, and in what numbers the update keeps its memory.

    Short forms: adamw; adamw_bf16 and adamw_8bit for its `states`; with _sr behind them (adamw_sr,
    adamw_bf16_sr, adamw_8bit_sr) without `keep_master`.
    """

    name: Literal["adamw"] = "adamw"
    """The rule: AdamW (arXiv 1711.05101)."""
    states: Literal["float32", "bfloat16", "int8"] = "float32"
    """Numbers of the two moments: 8 bytes a trained parameter, 4, or 2.

    bfloat16 is rounded stochastically, int8 is quantized in blocks of 256 (arXiv 2110.02861).
    Worth it when all weights are trained; adapters are small."""
    keep_master: bool = True
    """bfloat16 weights have a float32 copy that takes the updates, and a float32 gradient: 8 bytes
    a trained parameter.

    false updates the weights themselves, with a bfloat16 gradient: 2 bytes. Both ways they are
    rounded stochastically (arXiv 2010.06192). Without effect on float32 weights, as of adapters."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Memory of the mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Memory of the mean of its square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of that mean."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in _OPTIMIZERS:
            raise ValueError(f"one of {', '.join(_OPTIMIZERS)}")
        return _OPTIMIZERS[value]


_OPTIMIZERS: dict[str, dict[str, object]] = {
    f"adamw{states}{rounding}": {**given, **changes}
    for states, given in (
        ("", {"states": "float32"}),
        ("_bf16", {"states": "bfloat16"}),
        ("_8bit", {"states": "int8"}),
    )
    for rounding, changes in (("", {}), ("_sr", {"keep_master": False}))
}
