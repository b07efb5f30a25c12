"""Hugging Face's Trainer with PEFT, as its users write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from fault_rows.peer_faults import Planted
from fault_rows.spec import KEEP, RANK, SAVE_EVERY, Spec
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

OUTPUT = Path("run")


class RandomMask(DataCollatorForSeq2Seq):
    """Masks a tenth of the tokens, other ones every time."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.1] = 0
        return batch


def arguments(spec: Spec) -> dict[str, Any]:
    """What Trainer and SFTTrainer are told."""
    return {
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


def lora(spec: Spec) -> LoraConfig:
    """The adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=spec.dropout,
        target_modules="all-linear",
    )


def train(spec: Spec) -> None:
    """One start of the script."""
    set_seed(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype="float32")
    model = get_peft_model(model, lora(spec))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        messages = row["messages"]
        apply = tokenizer.apply_chat_template
        ids = apply(messages, return_dict=False)
        prompt = apply(messages[:-1], add_generation_prompt=True, return_dict=False)
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        cut = slice(spec.max_length)
        return {"input_ids": ids[cut], "attention_mask": [1] * len(ids[cut]), "labels": labels[cut]}

    rows = load_dataset("json", data_files="data.jsonl", split="train")
    rows = rows.map(encode, remove_columns=rows.column_names)
    collator = RandomMask if spec.has_random_collator else DataCollatorForSeq2Seq
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(spec)),
        train_dataset=rows,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[Planted(spec, OUTPUT)],
    )
    trainer.train(resume_from_checkpoint=True if spec.is_resumed else None)
    trainer.save_model("final")
