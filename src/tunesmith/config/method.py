"""The recipe's `method`: which weights change, and how."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from tunesmith.config.adapter_kinds import (
    ADAPTER_KINDS,
    OTHER_NAMES,
    PROMPT_KINDS,
    REFUSED_KINDS,
    SHORT_METHODS,
    VIRTUAL_TOKENS,
)
from tunesmith.config.base import Auto, PositiveInt, Strict

MUTATING_INITS = ("pissa", "pissa_niter_16", "olora")
"""First values that are taken out of the frozen weights, so that the sum is as before."""


class FullConfig(Strict):
    """All weights are trained."""

    name: Literal["full"]


class LoraConfig(Strict):
    """Low-rank adapters on frozen weights (arXiv 2106.09685), kept in PEFT's format.

    Short forms: `method: dora`, `rslora`, `pissa`, `olora`, `loftq`, `eva`.
    """

    name: Literal["lora"] = "lora"
    rank: Auto | PositiveInt = "auto"
    """Rank of the update; auto is 16."""
    alpha: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Scale numerator; the update is multiplied by alpha/rank. auto is twice the rank, 8 with
    `rslora`, the rank with `init: pissa`."""
    target: str | list[str] = "all-linear"
    """Layers that get an adapter: all-linear, a list of name endings, or a regular expression."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    layers: PositiveInt | None = None
    """Adapters on so many of the last decoder layers only; null is all layers."""
    rslora: bool = False
    """Multiply by alpha/sqrt(rank), so that large ranks learn as fast (arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA, arXiv 2402.09353).

    Slower: every pass needs the norms of all adapted weights."""
    init: Literal[
        "default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq", "eva"
    ] = "default"
    """First values: default is zero in B; pissa the largest singular vectors of the weight (arXiv
    2404.02948; _niter_16 finds them faster, not exactly), olora its QR (arXiv 2406.01775), loftq
    what nf4 has rounded off (arXiv 2310.08659), eva the main directions of the layer's inputs in
    the first batches (arXiv 2410.07170).

    pissa and olora take them out of the frozen weight; the result is an adapter of twice the rank
    for the weight as it was. loftq goes with `model.quantize` alone."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the model that are trained, too: none, all, or those of adapted layers."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict[str, PositiveInt])
    """Another rank for some layers: name ending or regular expression -> rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict[str, Annotated[float, Field(gt=0)]]
    )
    """Another alpha for some layers, in the same way."""
    train_modules: list[str] = Field(default_factory=list[str])
    """Modules trained whole besides, by name endings, e.g. [embed_tokens, lm_head]."""
    train_tokens: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list[int])
    """Tokens, by id, whose rows of the embedding and the head are trained besides; those of
    `model.new_tokens` are."""
    plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, where 16 is advised); null is
    the same for both."""

    @model_validator(mode="after")
    def _goes_together(self) -> LoraConfig:
        if self.dora and self.init in MUTATING_INITS:
            raise ValueError(f"`init: {self.init}` without `dora`: both change what is frozen")
        if self.dora and self.init == "loftq":
            raise ValueError(
                "`init: loftq` without `dora`, whose lengths are those of other weights"
            )
        ranks = [self.rank, *self.rank_pattern.values()]
        if self.init == "orthogonal" and any(rank != "auto" and rank % 2 for rank in ranks):
            raise ValueError("even ranks with `init: orthogonal`")
        return self


class FreezeConfig(Strict):
    """Some layers are trained as they are, all others are frozen."""

    name: Literal["freeze"]
    layers: Annotated[int, Field(ge=0)] = 2
    """How many of the last decoder layers are trained; 0 by default with `first` or `pattern`."""
    first: Annotated[int, Field(ge=0)] = 0
    """How many of the first decoder layers are trained."""
    pattern: str | None = None
    """A regular expression: parameters in whose names it is found are trained; null is none."""
    embeddings: bool = False
    """Train the embedding too, and with it a head that is the same matrix (a tied head)."""
    norm: bool = True
    """Train the norm behind the last layer too; false by default without last layers."""
    head: bool = False
    """Train the output head too, if it is not the embedding as well (a tied head)."""

    @model_validator(mode="before")
    @classmethod
    def _without_last_layers(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        given = cast("dict[str, object]", value)
        if "layers" not in given and (given.get("first") or given.get("pattern")):
            given = {**given, "layers": 0}
        if given.get("layers") == 0 and "norm" not in given:
            given = {**given, "norm": False}
        return given

    @model_validator(mode="after")
    def _trains_something(self) -> FreezeConfig:
        chosen = (self.layers, self.first, self.pattern, self.embeddings, self.norm, self.head)
        if not any(chosen):
            raise ValueError("something to train: layers, first, pattern, embeddings, norm or head")
        return self


class AdapterConfig(Strict):
    """Any other adapter that PEFT knows; its settings stand beside `kind` under PEFT's own names.

    Short forms: `method: ia3`, `prompt_tuning`, `prefix_tuning`, `p_tuning`, ... (docs/methods.md).
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    name: Literal["adapter"]
    kind: str
    """PEFT's peft_type, e.g. IA3, OFT, VERA, LOKR, PROMPT_TUNING."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        given = cast("dict[str, object]", value)
        if isinstance(given.get("kind"), str):
            kind = str(given["kind"]).upper().replace("-", "_")
            kind = OTHER_NAMES.get(kind, kind)
            given = {**given, "kind": kind}
            if kind in PROMPT_KINDS:
                given = {"num_virtual_tokens": VIRTUAL_TOKENS, **given}
            # PEFT draws both from a normal distribution otherwise, far outside of where embeddings
            # and keys are: SmolLM2-135M with 20 tokens, loss before the first step 0.35 without,
            # 0.37 and 5.7 so.
            if kind == "PROMPT_TUNING":
                given = {"prompt_tuning_init": "SAMPLE_VOCAB", **given}
            if kind == "PREFIX_TUNING":
                given = {"init_weights": "zero", **given}
            # Drawn frequencies change the model before it has learned: 0.52 becomes 0.81.
            if kind == "FOURIERFT":
                given = {"init_weights": True, **given}
        return given

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind in REFUSED_KINDS:
            raise ValueError(f"another kind than {kind}: {REFUSED_KINDS[kind]}")
        if kind not in ADAPTER_KINDS:
            near = difflib.get_close_matches(kind, ADAPTER_KINDS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"one of {', '.join(ADAPTER_KINDS)}{hint}")
        return kind

    @property
    def settings(self) -> dict[str, Any]:
        """PEFT's fields."""
        return dict(self.__pydantic_extra__)

    @property
    def is_prompt(self) -> bool:
        """Whether virtual tokens are learned, not changes of the model's modules."""
        return self.kind in PROMPT_KINDS


Method = FullConfig | LoraConfig | FreezeConfig | AdapterConfig


def draws_numbers(method: Method) -> bool:
    """Whether a forward in training draws random numbers for every row (dropout)."""
    if isinstance(method, AdapterConfig):
        return any("dropout" in key and value for key, value in method.settings.items())
    return isinstance(method, LoraConfig) and method.dropout > 0


def long_form(method: object) -> object:
    """A method's values with a short name such as `dora` written out."""
    if isinstance(method, str):
        method = {"name": method}
    if not isinstance(method, dict):
        return method
    values = {"name": "lora", **cast("dict[str, object]", method)}
    short = SHORT_METHODS.get(str(values["name"]).lower().replace("-", "_"))
    return values if short is None else {**short, **values, "name": short["name"]}


def auto_alpha(method: LoraConfig, rank: int) -> tuple[float, str]:
    """Scale numerator, and why."""
    if method.rslora:
        return 8.0, "a factor of 2 at rank 16"
    if method.init in ("pissa", "pissa_niter_16"):
        return float(rank), "the rank, as PiSSA has it"
    return 2.0 * rank, "twice the rank"


RATES = {"full": 2e-5, "freeze": 2e-5, "lora": 2e-4}
KIND_RATES = {
    "BEFT": 3e-3,
    "C3A": 3e-2,
    "DEFT": 1e-3,
    "DELORA": 4e-4,
    "FOURIERFT": 1e-2,
    "HIRA": 3e-3,
    "HRA": 1e-3,
    "IA3": 3e-3,
    "LN_TUNING": 1e-3,
    "LOHA": 5e-3,
    "LOKR": 1e-3,
    "PREFIX_TUNING": 2e-2,
    "PROMPT_TUNING": 1e-2,
    "P_TUNING": 3e-3,
    "ROAD": 3e-3,
    "SUPERTUNING": 1e-3,
    "TINYLORA": 1e-3,
    "TRAINABLE_TOKENS": 1e-3,
    "UNILORA": 5e-2,
    "VBLORA": 4e-3,
    "VERA": 3e-2,
}
"""The fewer numbers a kind trains, the further each has to go; kinds not here are as lora.

Of rates tried 5 or 25 times apart (SmolLM2-135M, 12 steps of 3 rows of GrammarGPT, the loss on 12
others from 0.52 down), one that is 2 to 5 times below the best, as lora's own is: for longer runs,
and for those that a rate too high would ruin. DeLoRA: 0.247, 0.245 and 0.431 at 2e-4, 1e-3, 5e-3;
LoHa: 0.481, 0.241, 0.224 at 1e-3, 5e-3, 2.5e-2; p-tuning: 0.423, 0.401, 0.620 at the same; UniLoRA:
0.520, 0.515, 0.421 at 5e-3, 2.5e-2, 0.125; VeRA: 0.302, 0.191 at 1e-2, 5e-2; LoRA: 0.217, 0.192,
0.209 at 2e-4, 8e-4, 3.2e-3.
"""


def base_learning_rate(method: Method) -> float:
    """Peak learning rate for a model 2,048 wide.

    LoRA wants about ten times the rate of full tuning.
    """
    if isinstance(method, AdapterConfig):
        return KIND_RATES.get(method.kind, RATES["lora"])
    return RATES[method.name]
