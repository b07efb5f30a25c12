"""The recipe: every key a user may write, its default, and what it means.

The docstring under each field is its help text. `auto` values are filled in by `config/auto.py`.
Short forms (`model: some/id`, `data: file.json`, `method: lora`) mean the long ones.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from tunesmith.config.base import Auto, Fraction, PositiveInt, Strict
from tunesmith.config.method import (
    AdapterConfig,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    long_form,
)
from tunesmith.config.objective import ObjectiveConfig, SftConfig
from tunesmith.config.optimizer import AdamWConfig, OptimizerConfig, check_optimizer
from tunesmith.config.sweep import SweepConfig
from tunesmith.config.trackers import TrackerConfig, checked_trackers


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
    quantize: Literal["none", "nf4", "int8"] = "none"
    """How frozen weights are kept under LoRA; nf4 is 4.13 bits a weight (QLoRA, arXiv 2305.14314),
    int8 is 8 (LLM.int8(), arXiv 2208.07339) and nearer to the plain weights.

    It saves memory and costs time: every pass makes the weights dense again. Needs bitsandbytes."""
    adapter: str | None = None
    """A LoRA adapter to go on from, in PEFT's format: a folder or a hub id; null starts anew."""
    merge_adapter: bool = False
    """Add that adapter to the weights first, and train by the method on top of it."""
    new_tokens: list[str] = Field(default_factory=list[str])
    """Texts that become tokens of their own, e.g. [<tool>], with embeddings that are trained."""
    new_special_tokens: list[str] = Field(default_factory=list[str])
    """The same, for tokens that only chat templates write: in the data's texts they stay text."""
    pad_vocabulary_to: PositiveInt | None = None
    """Rows of the embedding become a multiple of this, where the whole model is trained; null pads
    nothing."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return _from_short(value, "id")

    @model_validator(mode="after")
    def _has_what_to_merge(self) -> ModelConfig:
        if self.merge_adapter and self.adapter is None:
            raise ValueError("`merge_adapter` together with `adapter`")
        if self.merge_adapter and self.quantize != "none":
            raise ValueError("`merge_adapter` without `quantize`: merging would round once more")
        return self

    @model_validator(mode="after")
    def _tokens_are_new(self) -> ModelConfig:
        texts = [*self.new_tokens, *self.new_special_tokens]
        if len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
            raise ValueError("texts that differ and are not blank")
        return self


class SourceConfig(Strict):
    """One source of samples: a file, a folder, or a data set on a hub."""

    path: str
    """A file or folder, relative to the recipe or the working directory, or a data set on a hub:
    `hf:org/name`, `ms:org/name` (with `@revision` and `:split` if wanted)."""
    name: str | None = None
    """What reports call it; null takes the path's last part."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "completion",
        "qa",
        "text",
        "llama-chinese",
        "preference",
        "openai-preference",
        "kto",
        "labeled",
        "prompt",
    ] = "auto"
    """Shape of the rows; auto looks at their column names (docs/data.md)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Canonical column name -> name in the file, e.g. {instruction: question, output: answer}."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Names inside messages, e.g. {role: speaker, content: text, user: Q, assistant: A}."""
    encoding: str = "auto"
    """Text encoding, e.g. gb18030; auto is UTF-8, or what a byte order mark says."""
    split: str | None = None
    """Named split of a folder or data set; null takes `train` where there are splits."""
    sheet: str | None = None
    """Sheet of a workbook; null takes the first one with rows."""
    limit: PositiveInt | None = None
    """Read at most so many rows; null reads all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row comes in an epoch: 0.5 is another half each time, 2 is twice."""
    count: PositiveInt | None = None
    """Rows of this source in an epoch, in place of `weight`; null lets `weight` decide."""
    sha1: str | None = None
    """Hash that the file must have (LLaMA-Factory's file_sha1); null checks nothing."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return _from_short(value, "path")

    @property
    def label(self) -> str:
        """What reports call the source."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


def _sources(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


class ReplayConfig(Strict):
    """General data mixed in, so that the model does not forget what it could do before."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of an epoch's samples that come from it."""
    source: SourceConfig
    """The general data."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str):
            return {"source": value}
        if isinstance(value, dict) and "path" in value:
            data = cast("dict[str, object]", value)
            rest = {key: data[key] for key in data if key != "share"}
            return {**{key: data[key] for key in data if key == "share"}, "source": rest}
        return value


class DataConfig(Strict):
    """What to learn from and what to measure on."""

    train: list[SourceConfig] = Field(default_factory=list[SourceConfig])
    """Training data: a path, a list of paths, or a list of {path, format, columns, weight, ...}."""
    registry: str | None = None
    """A LLaMA-Factory dataset_info.json whose entries `names` picks; null uses `train` alone."""
    names: list[str] = Field(default_factory=list[str])
    """Entries of the registry to train on."""
    mix: Literal["shuffle", "interleave", "concat"] = "shuffle"
    """Order of several sources: shuffled together, evenly spread, or one after the other."""
    replay: ReplayConfig | None = None
    """General data against forgetting: {path, share}; null mixes nothing in."""
    validation: Auto | Fraction | Annotated[int, Field(ge=0)] | list[SourceConfig] = "auto"
    """A share (0.1) or a number (200) of the training rows held out, or data of their own.

    0 holds nothing out. auto is the `validation` split of the training data where it has one, else
    10 %, at most 1,000 rows, nothing under 10 rows."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """Rows with problems: stop and list them, or leave them out and count them."""
    template: str = "auto"
    """Chat template: auto is the tokenizer's own, else plain; or a name (docs/data.md), or a .jinja
    file."""
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables for the chat template, e.g. {enable_thinking: false} for Qwen3."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Thinking mode of the chat template; auto is the template's own default."""
    train_on: Literal["all", "last"] | list[int] = "all"
    """Answers that carry loss: all, the last one, or chosen ones (1 is the first, -1 the last)."""
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the prompt's tokens in the loss."""
    fill_in_middle: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of raw texts turned into fill-in-the-middle tasks, for models that know them."""
    max_length: Auto | Annotated[int, Field(ge=8)] = "auto"
    """Tokens a sample may have; auto is its longest sample, up to the model's context.

    Where raw text is split, pieces of it have at most 2,048 tokens by default."""
    overlong: Literal["auto", "drop", "cut_right", "cut_left", "split"] = "auto"
    """What happens to a longer sample: left out, its end or its start cut off, or cut into pieces.

    auto splits raw text and cuts the end of everything else."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str | list):
            return {"train": _sources(cast("object", value))}
        if not isinstance(value, dict):
            return value
        data = cast("dict[str, object]", value)
        if "path" in data and "train" in data:
            raise ValueError("either `path` or `train`, not both (data.train=... replaces it)")
        if "path" in data:
            source = {key: data[key] for key in data if key in SourceConfig.model_fields}
            rest = {key: data[key] for key in data if key not in SourceConfig.model_fields}
            data = {"train": [source], **rest}
        if "train" in data:
            data = {**data, "train": _sources(data["train"])}
        if isinstance(data.get("names"), str):
            data = {**data, "names": [data["names"]]}
        if isinstance(data.get("thinking"), bool):  # YAML reads on and off as true and false
            data = {**data, "thinking": "on" if data["thinking"] else "off"}
        if data.get("overlong") == "truncate":
            data = {**data, "overlong": "cut_right"}
        if isinstance(data.get("validation"), dict) or (
            isinstance(data.get("validation"), str) and data["validation"] != "auto"
        ):
            data = {**data, "validation": _sources(data["validation"])}
        return data

    @model_validator(mode="after")
    def _has_data(self) -> DataConfig:
        if not self.train and not self.names:
            raise ValueError("a path (`train`), or a `registry` with `names`")
        if bool(self.names) != (self.registry is not None):
            raise ValueError("`registry` and `names` together")
        others = list(self.validation) if isinstance(self.validation, list) else []
        others += [self.replay.source] if self.replay else []
        for source in others:
            if source.weight != 1.0 or source.count is not None:
                raise ValueError(
                    f"`weight` and `count` only for data to train on, not for {source.label}: "
                    "validation takes every row once, `replay.share` says how much is replayed"
                )
        return self


MethodConfig = Annotated[
    FullConfig | LoraConfig | FreezeConfig | AdapterConfig, Field(discriminator="name")
]


class TrainConfig(Strict):
    """How long and how fast to train."""

    epochs: Auto | PositiveInt = "auto"
    """Passes over the training rows; auto follows the number of rows."""
    global_batch: Auto | PositiveInt = "auto"
    """Samples per optimizer step; auto is 0.2 % of the rows, 1 to 256."""
    micro_batch_tokens: Auto | PositiveInt = "auto"
    """Tokens in one forward and backward; auto follows the memory."""
    checkpointing: Literal["auto", "none", "mlp", "attention", "full", "offload"] = "auto"
    """What the backward makes again to save memory: nothing, the inside of MLPs, or whole layers.

    attention is full with attention's output kept and not made again, for long sequences; offload
    is full with the rest kept in the host's memory; auto takes the cheapest that fits."""
    checkpointed_layers: Auto | Annotated[int, Field(ge=0)] = "auto"
    """The first so many layers do so, the others one step less; auto is as many as must."""
    compile: Literal["auto", "off", "kernels"] = "auto"
    """Let torch's compiler fuse chains of small operations.

    auto does so for long runs, which win back the time that compiling takes."""
    learning_rate: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Peak learning rate; auto follows method and model width."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (arXiv 1711.05101), on matrices only."""
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig)
    """How weights are updated: adamw, adamw_8bit, muon, galore, ... (docs/methods.md), or
    {name, ...} with settings."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null does not clip."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings while training (NEFTune, arXiv 2310.05914; 5 to 15 there); null is
    none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order, the split, new weights and dropout."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; null runs all epochs."""

    @model_validator(mode="after")
    def _layers_have_a_level(self) -> TrainConfig:
        if self.checkpointing == "auto" and self.checkpointed_layers != "auto":
            raise ValueError("`checkpointed_layers` together with `checkpointing`")
        return self

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class EvaluateConfig(Strict):
    """When to measure."""

    every: Literal["epoch"] | PositiveInt | None = "epoch"
    """Validation after every epoch, every N steps, or (null) only at the end."""
    early_stopping: PositiveInt | None = None
    """Stop after so many evaluations without a new best; null never stops early."""
    samples: Annotated[int, Field(ge=0)] = 4
    """So many held-out rows are answered before and after training, for people to read."""
    general: Literal["auto"] | str | None = "auto"
    """Questions with answers that show what the model forgets; auto takes those that are shipped,
    null none."""


class CheckpointConfig(Strict):
    """When to save and what to keep."""

    every_steps: Auto | PositiveInt = "auto"
    """Steps between checkpoints; auto is ten in a run, at least every 500 steps."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    background: Auto | bool = "auto"
    """Write checkpoints while training goes on, from a copy in memory.

    auto does so if the copy takes at most about a sixteenth of the memory."""


class GuardConfig(Strict):
    """What keeps bad numbers from the weights, and when a run counts as hung.

    A step whose loss or gradient is not finite never changes weights, whatever is set here.
    """

    spike_sigma: Auto | Annotated[float, Field(gt=0)] | None = "auto"
    """A loss so many standard deviations above the mean of the steps before is not learned from.

    null learns from all that is finite; auto is 6, and null for policies, whose losses have no
    level."""
    window_steps: PositiveInt = 128
    """So many steps before make up the mean; nothing is a spike before a quarter of them are."""
    rollback_after: PositiveInt = 3
    """After so many left-out steps in a row the run goes back to its last scheduled checkpoint
    and trains without their samples."""
    rollbacks: Annotated[int, Field(ge=0)] = 2
    """After so many times it stops instead."""
    hang_warn_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Without any progress for so long, the stacks of all threads are written down."""
    hang_stop_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Without any for so long, the run ends itself with exit code 75."""


class LogConfig(Strict):
    """What to write down."""

    every_steps: PositiveInt = 1
    """Steps between two step events."""
    trackers: list[TrackerConfig] = Field(default_factory=list[TrackerConfig])
    """Where else figures go: tensorboard, wandb, swanlab, mlflow, trackio (docs/trackers.md)."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: list[TrackerConfig]) -> list[TrackerConfig]:
        return checked_trackers(value)


class Recipe(Strict):
    """Everything that defines a run; only `model` and `data` have no default."""

    model: ModelConfig
    """The model to start from."""
    data: DataConfig
    """What to learn from."""
    method: MethodConfig = Field(default_factory=LoraConfig)
    """How weights change: lora, full, freeze, or another adapter (docs/methods.md)."""
    objective: ObjectiveConfig = Field(default_factory=SftConfig)
    """What is minimized: sft, pretrain, dpo, ipo, simpo, orpo, ..."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long and how fast."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """When to measure."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When to save."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """What to do about bad numbers and hangs."""
    log: LogConfig = Field(default_factory=LogConfig)
    """What to write down."""
    sweep: SweepConfig | None = None
    """What `tunesmith sweep` searches (docs/sweep.md); null is nothing."""
    output: str = "auto"
    """Run directory, relative to the working directory; auto is runs/<name of the recipe>."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        recipe = dict(cast("dict[str, object]", value))
        if "method" in recipe:
            recipe["method"] = long_form(recipe["method"])
        if "objective" in recipe:
            part = _from_short(recipe["objective"], "name")
            if isinstance(part, dict):
                part = {"name": "sft", **cast("dict[str, object]", part)}
            recipe["objective"] = part
        return recipe

    @field_validator("train")
    @classmethod
    def _optimizer_fits(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if "method" in info.data:  # else that is the problem to tell of
            check_optimizer(train.optimizer, info.data["method"])
        return train
