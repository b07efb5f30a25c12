"""The recipe: every key a user may write, its default, and what it means.

The docstring under each field is its help text. `auto` values are filled in by `config/auto.py`.
Short forms (`model: some/id`, `data: file.json`, `method: lora`) mean the long ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Base of the recipe's parts: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _from_short(value: object, key: str) -> object:
    """Reads `value` as `{key: value}` if it is a plain string."""
    return {key: value} if isinstance(value, str) else value


class ModelConfig(Strict):
    """The model to start from."""

    id: str
    """A folder, a `.gguf` file, a Hugging Face id, or `builtin:smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes its default branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers to compute with; auto is bfloat16 where the device is fast at it."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return _from_short(value, "id")


class SourceConfig(Strict):
    """One file of samples."""

    path: str
    """File, relative to the recipe or to the working directory."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "completion"] = "auto"
    """Shape of the rows; auto looks at their column names."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Canonical column name -> name in the file, e.g. {instruction: question, output: answer}."""
    encoding: str = "utf-8"
    """Text encoding of the file, e.g. gb18030."""
    limit: PositiveInt | None = None
    """Read at most so many rows; null reads all."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return _from_short(value, "path")


def _sources(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


class DataConfig(Strict):
    """What to learn from and what to measure on."""

    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """Training files: a path, a list of paths, or a list of {path, format, columns, ...}."""
    validation: Auto | Fraction | Annotated[int, Field(ge=0)] | list[SourceConfig] = "auto"
    """A share (0.1) or a number (200) of the training rows held out, or files of their own.

    0 holds nothing out. auto is 10 %, at most 1,000 rows, nothing under 10 rows."""
    template: str = "auto"
    """Chat template: auto is the tokenizer's own; plain is User:/Assistant:; or a .jinja file."""
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables for the chat template, e.g. {enable_thinking: false} for Qwen3."""
    max_length: Auto | Annotated[int, Field(ge=8)] = "auto"
    """Tokens a sample may have; auto is its longest sample, up to the model's context."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer sample: its end is cut off, or it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str | list):
            return {"train": _sources(cast("object", value))}
        if not isinstance(value, dict):
            return value
        data = cast("dict[str, object]", value)
        if "path" in data:
            source = {key: data[key] for key in data if key in SourceConfig.model_fields}
            rest = {key: data[key] for key in data if key not in SourceConfig.model_fields}
            return {"train": [source], **rest}
        if "train" in data:
            data = {**data, "train": _sources(data["train"])}
        if isinstance(data.get("validation"), dict) or (
            isinstance(data.get("validation"), str) and data["validation"] != "auto"
        ):
            data = {**data, "validation": _sources(data["validation"])}
        return data


class FullConfig(Strict):
    """All weights are trained."""

    name: Literal["full"]


class LoraConfig(Strict):
    """Low-rank adapters on frozen weights (arXiv 2106.09685), kept in PEFT's format."""

    name: Literal["lora"] = "lora"
    rank: Auto | PositiveInt = "auto"
    """Rank of the update; auto is 16."""
    alpha: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Scale numerator; the update is multiplied by alpha/rank. auto is twice the rank."""
    target: str | list[str] = "all-linear"
    """Layers that get an adapter: all-linear, a list of name endings, or a regular expression."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""


MethodConfig = Annotated[FullConfig | LoraConfig, Field(discriminator="name")]


class SftConfig(Strict):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    name: Literal["sft"] = "sft"


class TrainConfig(Strict):
    """How long and how fast to train."""

    epochs: Auto | PositiveInt = "auto"
    """Passes over the training rows; auto follows the number of rows."""
    global_batch: Auto | PositiveInt = "auto"
    """Samples per optimizer step; auto is 0.2 % of the rows, 1 to 256."""
    micro_batch_tokens: Auto | PositiveInt = "auto"
    """Tokens in one forward and backward; auto follows the memory."""
    learning_rate: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate; auto follows method and model width."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null does not clip."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order, the split, new weights and dropout."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; null runs all epochs."""


class EvaluateConfig(Strict):
    """When to measure."""

    every: Literal["epoch"] | PositiveInt | None = "epoch"
    """Validation after every epoch, every N steps, or (null) only at the end."""
    early_stopping: PositiveInt | None = None
    """Stop after so many evaluations without a new best; null never stops early."""


class CheckpointConfig(Strict):
    """When to save and what to keep."""

    every_steps: Auto | PositiveInt = "auto"
    """Steps between checkpoints; auto is ten in a run, at least every 500 steps."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept besides."""


class LogConfig(Strict):
    """What to write down."""

    every_steps: PositiveInt = 1
    """Steps between two step events."""


class Recipe(Strict):
    """Everything that defines a run; only `model` and `data` have no default."""

    model: ModelConfig
    """The model to start from."""
    data: DataConfig
    """What to learn from."""
    method: MethodConfig = Field(default_factory=LoraConfig)
    """How weights change: lora or full."""
    objective: SftConfig = Field(default_factory=SftConfig)
    """What is minimized: sft."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long and how fast."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """When to measure."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When to save."""
    log: LogConfig = Field(default_factory=LogConfig)
    """What to write down."""
    output: str = "auto"
    """Run directory, relative to the working directory; auto is runs/<name of the recipe>."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        recipe = dict(cast("dict[str, object]", value))
        for key, default in (("method", "lora"), ("objective", "sft")):
            if key in recipe:
                part = _from_short(recipe[key], "name")
                if isinstance(part, dict):
                    part = {"name": default, **cast("dict[str, object]", part)}
                recipe[key] = part
        return recipe
