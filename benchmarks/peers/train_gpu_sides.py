"""The sides of the GPU benchmark: tunesmith, plain transformers with PEFT, and TRL with Liger.

As on the CPU tunesmith goes first and writes down the rows of each step. All rows have one length,
so the peers batch them without padding and without masks.

The times of the parts come from steps of their own after the others, because marks between the
parts make the host wait. Forward is all up to the loss, backward what follows up to the clipping,
optimizer the rest. Where a side computes gradients of the head in the forward, they count there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from peers import train_tunesmith
from peers.train_trl import load_adapter, lora_config
from peers.train_work import (
    Measured,
    Shared,
    StepClock,
    Work,
    clock_callback,
    read_json,
    synchronize,
    write_json,
)

PARTS = ("forward", "backward", "optimizer")

PARTED_STEPS = 3

NF4_BLOCK: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class GpuWork:
    """What a side does beyond `Work`."""

    device: str
    method: str
    """lora, qlora or full."""
    has_checkpointing: bool
    """Of the peers; tunesmith decides by itself."""
    profile: str | None
    """Folder for tunesmith's profile."""


@dataclass
class PartClock:
    """Seconds of the parts of a step, between marks."""

    device: str
    seconds: dict[str, list[float]]
    _last: float = 0.0

    @classmethod
    def on(cls, device: str) -> PartClock:
        """A clock without figures."""
        return cls(device, defaultdict(list))

    def mark(self, part: str | None = None) -> None:
        """Ends a part, and begins the next; without a name it only begins one."""
        if self.device == "cuda":
            synchronize()
        now = time.perf_counter()
        if part:
            self.seconds[part].append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        """The usual time of each part, in seconds."""
        return {part: median(self.seconds[part]) for part in PARTS if part in self.seconds}


def read_work(folder: Path) -> tuple[Work, GpuWork]:
    """What the parent wrote."""
    return Work(**read_json(folder / "work.json")), GpuWork(**read_json(folder / "gpu.json"))


def write_parts(folder: Path, clock: PartClock) -> None:
    """Where the parent looks for the parts."""
    write_json(folder / "parts.json", clock.medians())


# tunesmith


def measure_tunesmith(folder: Path) -> Measured:
    """A run as `tunesmith train` makes it."""
    from tunesmith.job import prepare
    from tunesmith.types import SilentReporter

    work, gpu = read_work(folder)
    loaded = train_tunesmith.recipe_of(work, folder)
    train = {"micro_batch_tokens": work.global_batch * work.max_length}
    changes: dict[str, Any] = {"train": loaded.recipe.train.model_copy(update=train)}
    if gpu.method == "qlora":
        changes["model"] = loaded.recipe.model.model_copy(update={"quantize": "nf4"})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update=changes))
    job = prepare(loaded, SilentReporter())
    clock = StepClock(work.steps, gpu.device)

    def afterwards(run: Any) -> None:
        parts = PartClock.on(gpu.device)
        for step in range(PARTED_STEPS):
            parted_step(run, step, parts)
        write_parts(folder, parts)
        if gpu.profile:
            profile(run, Path(gpu.profile), gpu)

    loss_again = train_tunesmith.train(job, work, folder, clock, afterwards)
    label = f"{job.resolved.recipe.model.dtype}, {work.global_batch} rows/forward"
    return clock.measured(label, train_tunesmith.PACKAGES, loss_again)


def parted_step(run: Any, step: int, clock: PartClock) -> None:
    """What `engine.loop.update` does, with marks between its parts."""
    import torch

    batch = run.loader.batch(step)
    run.model.train()
    run.optimizer.zero_grad()
    for micro_batch in batch.micro_batches:
        placed = micro_batch.to(run.device)
        clock.mark()
        with run.autocast():
            result = run.objective.step(run.model, placed)
        clock.mark("forward")
        (result.loss_sum / batch.supervised_weight).backward()
        clock.mark("backward")
    norm = run.optimizer.clip(run.recipe.train.clip_norm)
    run.optimizer.step(run.recipe.train.learning_rate, torch.isfinite(norm))
    clock.mark("optimizer")


def profile(run: Any, folder: Path, gpu: GpuWork) -> None:
    """A trace of two steps for a browser, and a table of the slowest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from tunesmith.engine.step import update

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (gpu.device == "cuda")
    with torch_profile(activities=kinds, record_shapes=True) as found:
        for step in range(2):
            update(run, run.loader.batch(step), step)
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if gpu.device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=40)
    (folder / "table.txt").write_text(table, encoding="utf-8")


# transformers and PEFT


def measure_plain(folder: Path) -> Measured:
    """A plain loop around transformers' model and PEFT's adapters."""
    import torch

    work, gpu = read_work(folder)
    shared = Shared.read(folder)
    model = plain_model(shared, gpu)
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=work.learning_rate, weight_decay=0.0, fused=True)
    clock, parts = StepClock(work.steps, gpu.device), PartClock.on(gpu.device)
    batches = list(tensors(shared, work.steps, gpu.device))
    for batch in batches:
        clock.start()
        loss, norm = plain_step(model, optimizer, batch, shared.clip_norm)
        clock.stop()
        clock.note(loss, norm)
    for batch in batches[:PARTED_STEPS]:
        plain_step(model, optimizer, batch, shared.clip_norm, parts)
    write_parts(folder, parts)
    label = f"sdpa, bf16 autocast, checkpointing {'on' if gpu.has_checkpointing else 'off'}"
    return clock.measured(label, ("torch", "transformers", "peft"), clock.losses[-1])


def plain_step(
    model: Any, optimizer: Any, batch: Any, clip_norm: float, parts: PartClock | None = None
) -> tuple[float, float]:
    """One optimizer step; loss and gradient norm."""
    import torch

    mark = parts.mark if parts else (lambda _=None: None)
    ids, labels = batch
    mark()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    mark("forward")
    loss.backward()
    mark("backward")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    return float(loss), float(norm)


def plain_model(shared: Shared, gpu: GpuWork) -> Any:
    """The model on its device with the shared first adapter; full tuning keeps fp32 weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if gpu.method == "qlora":
        extra = {"quantization_config": nf4(), "device_map": {"": gpu.device}}
    dtype = "float32" if gpu.method == "full" else "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(
        shared.model_path, dtype=dtype, attn_implementation="sdpa", **extra
    )
    if gpu.has_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if shared.adapter:
        model = PeftModel.from_pretrained(model, shared.adapter, is_trainable=True)
    return model if gpu.method == "qlora" else model.to(gpu.device)


def nf4() -> Any:
    """bitsandbytes' settings for QLoRA (arXiv 2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **NF4_BLOCK)


def tensors(shared: Shared, steps: int, device: str) -> Iterator[tuple[Any, Any]]:
    """The rows of each step, and of the first one again, as (ids, labels)."""
    import torch

    for rows in [*shared.batches[:steps], shared.batches[0]]:
        if len({len(row["input_ids"]) for row in rows}) != 1:
            raise ValueError("rows of different lengths")
        ids, labels = (
            torch.tensor([row[key] for row in rows], device=device)
            for key in ("input_ids", "labels")
        )
        yield ids, labels


# TRL with Liger


def measure_trl(folder: Path) -> Measured:
    """SFTTrainer with Liger's kernels (not on a CPU, where they do not exist)."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    work, gpu = read_work(folder)
    shared, clock = Shared.read(folder), StepClock(work.steps, gpu.device)
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in shared.rows(work.steps)]
    trainer = SFTTrainer(
        model=shared.model_path,
        args=trl_arguments(folder, work, gpu, shared),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(shared.model_path),
        peft_config=lora_config(shared),
    )
    if shared.adapter:
        load_adapter(trainer.model, shared.adapter)
    trainer.add_callback(clock_callback(clock))
    trainer.train()
    write_json(folder / "parts.json", {})
    liger = "Liger" if gpu.device == "cuda" else "no Liger"
    label = f"{liger}, checkpointing {'on' if gpu.has_checkpointing else 'off'}"
    return clock.measured(label, ("torch", "transformers", "peft", "trl"), clock.losses[-1])


def trl_arguments(folder: Path, work: Work, gpu: GpuWork, shared: Shared) -> Any:
    """The trainer's arguments."""
    from trl import SFTConfig

    place: dict[str, Any] = {"dtype": "float32" if gpu.method == "full" else "bfloat16"}
    place |= {"quantization_config": nf4()} if gpu.method == "qlora" else {}
    return SFTConfig(
        output_dir=str(folder / "trl"),
        model_init_kwargs={**place, "attn_implementation": "sdpa"},
        use_liger_kernel=gpu.device == "cuda",
        use_cpu=gpu.device == "cpu",
        max_steps=work.steps + 1,
        per_device_train_batch_size=work.global_batch,
        gradient_accumulation_steps=1,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=shared.clip_norm,
        optim="adamw_torch_fused",
        seed=work.seed,
        bf16=True,
        gradient_checkpointing=gpu.has_checkpointing,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


SIDES = {"tunesmith": measure_tunesmith, "plain": measure_plain, "trl": measure_trl}
