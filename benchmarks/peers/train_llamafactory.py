"""LLaMA-Factory's side of the training benchmark, driven in its own way.

The rows stand in a file that `dataset_info.json` names, its arguments are read by its own parser,
and its `run_sft` loads, tokenizes and trains. The template is `empty`, because the texts of the
rows are rendered already: so its tokens are the model's own, and they are compared with
tunesmith's, id for id, before the first step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers.train_work import (
    IGNORED_LABEL,
    Measured,
    Shared,
    StepClock,
    Work,
    clock_callback,
    read_json,
)

PACKAGES = ("torch", "transformers", "peft", "llamafactory")

DATASET = "rows"


@dataclass(frozen=True)
class LlamaFactorySettings:
    """How it trains; the defaults are those of its examples, and of recipes made from them."""

    rows_per_forward: int | None = 1
    """None is the whole global batch."""
    has_checkpointing: bool = True
    """Gradient checkpointing, which LLaMA-Factory turns on by itself."""
    is_bf16: bool = True
    is_packed: bool = False
    """`neat_packing`: all rows of a global batch in one sequence, kept apart by a 4-D mask."""

    @property
    def label(self) -> str:
        """The settings in one line."""
        rows = "all" if self.rows_per_forward is None else str(self.rows_per_forward)
        batch = "neat_packing" if self.is_packed else f"{rows} rows/forward"
        checkpointing = "gradient checkpointing" if self.has_checkpointing else "no checkpointing"
        return f"{batch}, {checkpointing}, {'bf16' if self.is_bf16 else 'fp32'}"


SEEDS = LlamaFactorySettings()
"""`per_device_train_batch_size: 1`, `gradient_accumulation_steps: 8`, `bf16: true`."""

BEST = LlamaFactorySettings(has_checkpointing=False, rows_per_forward=None, is_packed=True)


def candidates(dtype: str, global_batch: int) -> list[LlamaFactorySettings]:
    """What is tried to find the fastest settings; the first one is taken untried."""
    unpacked = replace(BEST, is_packed=False)
    tried = (
        BEST,
        unpacked,
        replace(unpacked, rows_per_forward=4),
        replace(unpacked, rows_per_forward=2),
        replace(unpacked, rows_per_forward=1),
        replace(BEST, is_bf16=False),
        replace(unpacked, is_bf16=False),
    )
    if dtype != "bfloat16":
        tried = tuple(replace(each, is_bf16=False) for each in tried)
    fitting = (each for each in tried if global_batch % (each.rows_per_forward or 1) == 0)
    return list(dict.fromkeys(fitting))


def measure(folder: Path) -> Measured:
    """Trains with `run_sft`."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import run_sft

    work, shared = Work(**read_json(folder / "work.json")), Shared.read(folder)
    peer = read_json(folder / "peer.json")
    settings, clock = LlamaFactorySettings(**peer["settings"]), StepClock(peer["steps"])
    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "llamafactory", ignore_errors=True)  # it would go on in it
    write_rows(folder, shared, clock.num_steps)
    check = check_callback(shared, clock.num_steps)
    run_sft(
        *get_train_args(arguments(folder, work, shared, settings, clock.num_steps)),
        callbacks=[check, clock_callback(clock)],
    )
    return clock.measured(settings.label, PACKAGES, clock.losses[-1], check.supervised_extra)


def write_rows(folder: Path, shared: Shared, steps: int) -> None:
    """The rows in the order of the steps, and the registry that names their file."""
    rows = [{key: row[key] for key in ("prompt", "response")} for row in shared.rows(steps)]
    (folder / f"{DATASET}.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "prompt", "response": "response"}
    entry = {"file_name": f"{DATASET}.json", "formatting": "alpaca", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({DATASET: entry}), encoding="utf-8")


def arguments(
    folder: Path, work: Work, shared: Shared, settings: LlamaFactorySettings, steps: int
) -> dict[str, Any]:
    """A recipe in LLaMA-Factory's words; all that is not named keeps its default."""
    # One pack holds one global batch: then packing changes nothing of what a step learns from.
    longest = max(sum(len(row["input_ids"]) for row in batch) for batch in shared.batches[:steps])
    # For packs it takes one off cutoff_len, and then fills them up to cutoff_len. That has to be a
    # multiple of 8: its collator rounds the ids up but not the positions.
    pack = -(-(longest + 1) // 8) * 8
    size = 1 if settings.is_packed else settings.rows_per_forward or work.global_batch
    per_step = 1 if settings.is_packed else work.global_batch // size
    recipe = {
        "model_name_or_path": shared.model_path,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": work.method,
        "dataset": DATASET,
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": pack if settings.is_packed else work.max_length,
        "preprocessing_batch_size": work.global_batch,
        "overwrite_cache": True,
        "neat_packing": settings.is_packed,
        "packing": settings.is_packed,
        "disable_shuffling": True,
        "output_dir": str(folder / "llamafactory"),
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": steps + 1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": per_step,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": shared.clip_norm,
        "seed": work.seed,
        "bf16": settings.is_bf16,
        "disable_gradient_checkpointing": not settings.has_checkpointing,
        "use_cpu": True,
    }
    if shared.lora:
        recipe |= {"lora_rank": shared.lora["r"], "lora_alpha": int(shared.lora["lora_alpha"])}
        recipe |= {"lora_target": "all", "adapter_name_or_path": shared.adapter}
    return recipe


def check_callback(shared: Shared, steps: int) -> Any:
    """Compares what LLaMA-Factory trains on with the shared rows, before the first step."""
    from transformers import TrainerCallback

    class Check(TrainerCallback):
        supervised_extra = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            dataset = kwargs["train_dataloader"].dataset
            self.supervised_extra = differences(shared, steps, list(dataset))

    return Check()


def differences(shared: Shared, steps: int, items: list[dict[str, Any]]) -> int:
    """Supervised tokens beyond the shared ones.

    Raises:
        ValueError: a step would learn from other rows.
    """
    expected = [(row["input_ids"], row["labels"]) for row in shared.rows(steps)]
    found = [segment for item in items for segment in segments(item)]
    size = len(shared.batches[0])
    for at in range(0, len(expected), size):
        ours, theirs = sorted(expected[at : at + size]), sorted(found[at : at + size])
        ids = ([row for row, _ in side] for side in (ours, theirs))
        if len(set(map(str, ids))) != 1:
            raise ValueError(f"step {at // size + 1}: other rows or tokens than tunesmith's")
    counts = (
        sum(label != IGNORED_LABEL for _, labels in side for label in labels)
        for side in (found, expected)
    )
    return next(counts) - next(counts)


def segments(item: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The rows in one item: a pack numbers its rows from 1 in the attention mask, 0 is padding."""
    mask = item["attention_mask"]
    for number in range(1, max(mask) + 1):
        places = [place for place, value in enumerate(mask) if value == number]
        ids, labels = ([item[key][p] for p in places] for key in ("input_ids", "labels"))
        yield ids, labels
