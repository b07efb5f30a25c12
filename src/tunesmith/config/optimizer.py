"""The recipe's `train.optimizer`: a class for each rule, which has its own settings only."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.config.base import PositiveInt, Strict
from tunesmith.config.method import FreezeConfig, FullConfig, Method

States = Literal["float32", "bfloat16", "int8"]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Rounding(Strict):
    """What all rules have."""

    keep_master: bool = True
    """bfloat16 weights have a float32 copy that takes the updates, and a float32 gradient: 8 bytes
    a trained parameter.

    false updates the weights themselves, with a bfloat16 gradient: 2 bytes. Both ways they are
    rounded stochastically (arXiv 2010.06192). Without effect on float32 weights, as of adapters."""


class Adam(Rounding):
    """AdamW's own numbers, for rules that use it for some or all parameters."""

    beta1: Share = 0.9
    """AdamW's memory of the mean of the gradient."""
    beta2: Share = 0.999
    """AdamW's memory of the mean of its square."""
    epsilon: Positive = 1e-8
    """Added to the root of that mean."""


class AdamWConfig(Adam):
    """AdamW (arXiv 1711.05101).

    Short forms: adamw; adamw_bf16 and adamw_8bit for its `states`; with _sr behind them (adamw_sr,
    adamw_bf16_sr, adamw_8bit_sr) without `keep_master`.
    """

    name: Literal["adamw"] = "adamw"
    states: States = "float32"
    """Numbers of the two moments: 8 bytes a trained parameter, 4, or 2.

    bfloat16 is rounded stochastically, int8 is quantized in blocks of 256 (arXiv 2110.02861).
    Worth it when all weights are trained; adapters are small."""


class MuonConfig(Adam):
    """Muon (Keller Jordan; arXiv 2502.16982): momentum made orthogonal.

    For matrices inside layers; all else is AdamW's, with these betas.
    """

    name: Literal["muon"]
    momentum: Share = 0.95
    """Memory of the gradient."""
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """Of Newton-Schulz, which makes it orthogonal."""
    states: States = "float32"
    """Numbers of the momentum, and of AdamW's moments: 4 bytes a parameter of a matrix, 2, or 1."""


class GaloreConfig(Adam):
    """GaLore (arXiv 2403.03507): Adam in the main directions of each matrix's gradient.

    For matrices inside layers; all else is AdamW's, with the same betas.
    """

    name: Literal["galore"]
    rank: PositiveInt = 128
    """Directions that are kept."""
    update_every: PositiveInt = 200
    """Updates between two choices of them."""
    scale: Positive = 2.0
    """Factor on the learning rate of these matrices.

    sqrt(width / rank) makes updates as large as AdamW's, about 2 for a quarter of the directions;
    the paper pretrains with 0.25 and rates of 0.01."""


class ApolloConfig(Adam):
    """APOLLO (arXiv 2412.05270): gradients scaled as AdamW would, seen in a random projection.

    For matrices inside layers; all else is AdamW's, with the same betas. Short forms: apollo, and
    apollo_mini: rank 1, one factor a matrix, scale 128.
    """

    name: Literal["apollo"]
    rank: PositiveInt = 256
    """Of the projection."""
    update_every: PositiveInt = 200
    """Updates between two projections."""
    scale: Positive = 1.0
    """Its root is a factor on the learning rate of these matrices, as in the authors' code."""
    factors: Literal["channel", "matrix"] = "channel"
    """One factor for each channel of a matrix, or for all of it."""


class BadamConfig(Adam):
    """BAdam (arXiv 2404.02827): AdamW on one decoder layer at a time; for full tuning."""

    name: Literal["badam"]
    switch_every: PositiveInt = 100
    """Steps with one layer."""
    order: Literal["random", "ascending", "descending"] = "random"
    """Of the layers; random ones are drawn anew each time all have had their turn."""
    outside: bool = False
    """Train what lies outside the layers, too, as a block of its own: embeddings, norm and head."""
    states: States = "float32"
    """Numbers of the moments, which only the layer being trained has."""


class AdafactorConfig(Rounding):
    """Adafactor (arXiv 1804.04235), as torch.optim.Adafactor.

    Its learning rate is a share of the weights' own size.
    """

    name: Literal["adafactor"]
    decay: Annotated[float, Field(lt=0)] = -0.8
    """Exponent of the memory: the t-th gradient counts t^decay."""
    clip: Positive = 1.0
    """Largest root mean square of an update, before the learning rate."""
    floor: Positive = 1e-3
    """Smallest size that weights count with."""


class LionConfig(Rounding):
    """Lion (arXiv 2302.06675): the sign of a mean."""

    name: Literal["lion"]
    beta1: Share = 0.9
    """Weight of the memory in an update."""
    beta2: Share = 0.99
    """Memory of the gradient."""
    states: States = "float32"
    """Numbers in which it is kept: 4 bytes a trained parameter, 2, or 1."""


class SgdConfig(Rounding):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    momentum: Share = 0.9
    """Share of the last step that is taken again; 0 remembers nothing."""
    states: States = "float32"
    """Numbers of the momentum: 4 bytes a trained parameter, 2, or 1."""

    @model_validator(mode="after")
    def _remembers(self) -> SgdConfig:
        if not self.momentum and self.states != "float32":
            raise ValueError("`states` with a `momentum` above 0: nothing else is kept")
        return self


AnyOptimizer = (
    AdamWConfig
    | MuonConfig
    | GaloreConfig
    | ApolloConfig
    | BadamConfig
    | AdafactorConfig
    | LionConfig
    | SgdConfig
)

MATRIX_RULES = (MuonConfig, GaloreConfig, ApolloConfig)
"""For matrices inside layers; all else is AdamW's."""

SHORT_OPTIMIZERS: dict[str, dict[str, object]] = {
    **{
        f"adamw{states}{rounding}": {"name": "adamw", **given, **changes}
        for states, given in (
            ("", {"states": "float32"}),
            ("_bf16", {"states": "bfloat16"}),
            ("_8bit", {"states": "int8"}),
        )
        for rounding, changes in (("", {}), ("_sr", {"keep_master": False}))
    },
    **{name: {"name": name} for name in ("muon", "galore", "apollo", "badam")},
    "apollo_mini": {"name": "apollo", "rank": 1, "scale": 128.0, "factors": "matrix"},
    **{name: {"name": name} for name in ("adafactor", "lion", "sgd")},
}


def optimizer_long_form(value: object) -> object:
    """A short form, or settings with one as their `name`, written out; AdamW without a name."""
    if isinstance(value, str):
        if value not in SHORT_OPTIMIZERS:
            raise ValueError(f"one of {', '.join(SHORT_OPTIMIZERS)}")
        return SHORT_OPTIMIZERS[value]
    if isinstance(value, dict):
        given = cast("dict[str, object]", value)
        name = given.get("name", "adamw")
        short = SHORT_OPTIMIZERS.get(name, {}) if isinstance(name, str) else {}
        return {"name": name, **given, **short, **{k: v for k, v in given.items() if k != "name"}}
    return value


OptimizerConfig = Annotated[
    Annotated[AnyOptimizer, Field(discriminator="name")], BeforeValidator(optimizer_long_form)
]


def check_optimizer(optimizer: AnyOptimizer, method: Method) -> None:
    """Refuses rules that a method does not go with.

    Raises:
        ValueError: it does not.
    """
    is_whole = isinstance(method, FullConfig | FreezeConfig)
    if isinstance(optimizer, GaloreConfig | ApolloConfig) and not is_whole:
        raise ValueError(
            f"`train.optimizer: {optimizer.name}` with `method: full` or `freeze`: "
            "adapters are of low rank already"
        )
    if isinstance(optimizer, BadamConfig) and not isinstance(method, FullConfig):
        raise ValueError("`train.optimizer: badam` with `method: full`: it chooses the layers")
