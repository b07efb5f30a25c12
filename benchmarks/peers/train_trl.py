"""TRL's side of the training benchmark: its SFTTrainer on the rows that tunesmith wrote down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers.train_work import (
    Measured,
    Shared,
    StepClock,
    Work,
    clock_callback,
    read_json,
)

PACKAGES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class TrlSettings:
    """How the trainer does it; none changes what is computed.

    `head` is fused (SFTTrainer's own loss, with its metrics, at every position) or logits (its
    `compute_loss` overridden by the plain Trainer's, as its deprecation notes advise).
    """

    is_default: bool = False
    """As SFTTrainer comes, with a model's path: nothing below is used."""
    rows_per_forward: int | None = None
    """None is the whole global batch."""
    is_padding_free: bool = True
    attention: str = "sdpa"
    weights: str = "bfloat16"
    has_autocast: bool = True
    head: str = "logits"

    @property
    def label(self) -> str:
        """The settings in one line."""
        if self.is_default:
            return "SFTConfig's defaults (gradient checkpointing, padded, bf16 autocast)"
        rows = "all" if self.rows_per_forward is None else str(self.rows_per_forward)
        batch = "padding-free" if self.is_padding_free else "padded"
        autocast = "bf16 autocast" if self.has_autocast else "no autocast"
        return (
            f"{rows} rows/forward, {batch}, {self.attention}, {self.weights} weights, "
            f"{autocast}, {self.head} head"
        )


DEFAULT = TrlSettings(is_default=True)

BEST = TrlSettings()


def candidates(method: str, dtype: str, global_batch: int) -> list[TrlSettings]:
    """What is tried to find the fastest settings; the first one is taken untried.

    Full tuning keeps fp32 weights on all sides: bfloat16 would round small updates away. A machine
    without fast bfloat16 is served with float32 alone, as tunesmith does there.
    """
    tried = (
        BEST,
        replace(BEST, rows_per_forward=2),
        replace(BEST, weights="float32"),
        replace(BEST, has_autocast=False),
        replace(BEST, weights="float32", has_autocast=False),
        replace(BEST, head="fused"),
        replace(BEST, is_padding_free=False),
        replace(BEST, is_padding_free=False, rows_per_forward=2),
        replace(BEST, is_padding_free=False, rows_per_forward=1),
    )
    if dtype != "bfloat16":
        tried = tuple(replace(each, weights="float32", has_autocast=False) for each in tried)
    if method == "full":
        tried = tuple(replace(each, weights="float32") for each in tried)
    fitting = (each for each in tried if global_batch % (each.rows_per_forward or 1) == 0)
    return list(dict.fromkeys(fitting))


def measure(folder: Path) -> Measured:
    """Trains with SFTTrainer."""
    import torch

    work, shared = Work(**read_json(folder / "work.json")), Shared.read(folder)
    spec = read_json(folder / "peer.json")
    settings, clock = TrlSettings(**spec["settings"]), StepClock(spec["steps"])
    torch.set_num_threads(work.threads)
    trainer = build_trainer(folder, work, shared, settings, clock.num_steps)
    trainer.add_callback(clock_callback(clock))
    trainer.train()
    return clock.measured(settings.label, PACKAGES, clock.losses[-1])


def build_trainer(
    folder: Path, work: Work, shared: Shared, settings: TrlSettings, steps: int
) -> Any:
    """SFTTrainer with the shared rows, numbers and first adapter."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import SFTTrainer

    class Peer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            if settings.is_default or settings.head == "fused":
                return super().compute_loss(model, inputs, **kwargs)
            inputs["use_cache"] = False
            return Trainer.compute_loss(self, model, inputs, **kwargs)

    model: Any = shared.model_path
    if not settings.is_default:
        model = AutoModelForCausalLM.from_pretrained(
            shared.model_path, dtype=settings.weights, attn_implementation=settings.attention
        )
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in shared.rows(steps)]
    trainer = Peer(
        model=model,
        args=arguments(folder, work, shared, settings, steps),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(shared.model_path),
        peft_config=lora_config(shared),
    )
    if shared.adapter:
        load_adapter(trainer.model, shared.adapter)
    return trainer


def lora_config(shared: Shared) -> Any:
    """PEFT's configuration, or None for full tuning."""
    from peft import LoraConfig

    if shared.lora is None:
        return None
    numbers: dict[str, Any] = {**shared.lora, "target_modules": "all-linear"}
    return LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **numbers)


def load_adapter(model: Any, folder: str) -> None:
    """Puts the shared first adapter into the trainer's model."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    missing = set_peft_model_state_dict(model, load_file(f"{folder}/adapter_model.safetensors"))
    if missing.unexpected_keys:
        raise ValueError(f"the adapters differ: {missing.unexpected_keys[:4]}")


def arguments(folder: Path, work: Work, shared: Shared, settings: TrlSettings, steps: int) -> Any:
    """The trainer's arguments: what has to be equal, and then how it is done."""
    from trl import SFTConfig

    default_size = SFTConfig.__dataclass_fields__["per_device_train_batch_size"].default
    size = settings.rows_per_forward or work.global_batch
    if settings.is_default:
        size = min(default_size, work.global_batch)
    equal_work = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps + 1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": work.global_batch // size,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": shared.clip_norm,
        "seed": work.seed,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if settings.is_default:
        return SFTConfig(**equal_work)
    return SFTConfig(
        **equal_work,
        optim="adamw_torch_fused",
        bf16=settings.has_autocast,
        padding_free=settings.is_padding_free,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
