"""LLaMA-Factory, as `llamafactory-cli train recipe.yaml` runs it; the same command resumes."""

from __future__ import annotations

import json
from pathlib import Path

from fault_rows.peer_faults import Planted
from fault_rows.spec import KEEP, RANK, SAVE_EVERY, Spec
from llamafactory.train.tuner import run_exp

OUTPUT = Path("run")


def train(spec: Spec) -> None:
    """One start of the command."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    entry = {
        "file_name": "data.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "assistant_tag": "assistant", "system_tag": "system"},
    }
    Path("dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    recipe = {
        "model_name_or_path": spec.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": spec.dropout,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": ".",
        "template": "chatml",
        "cutoff_len": spec.max_length,
        "output_dir": str(OUTPUT),
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "learning_rate": spec.learning_rate,
        "save_steps": SAVE_EVERY,
        "save_total_limit": KEEP,
        "logging_steps": spec.log_every,
        "seed": spec.seed,
        "auto_find_batch_size": spec.finds_batch_size,
        "enable_jit_checkpoint": spec.has_jit_checkpoint,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    run_exp(recipe, callbacks=[Planted(spec, OUTPUT)])
