"""TRL's SFTTrainer on rows of prompt and completion, as its users write it."""

from __future__ import annotations

from datasets import load_dataset
from fault_rows.peer_faults import Planted
from fault_rows.peer_hf import OUTPUT, RandomMask, arguments, lora
from fault_rows.spec import Spec
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer


def train(spec: Spec) -> None:
    """One start of the script."""
    set_seed(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    trainer = SFTTrainer(
        model=spec.model,
        args=SFTConfig(max_length=spec.max_length, bf16=False, **arguments(spec)),
        train_dataset=load_dataset("json", data_files="data.jsonl", split="train"),
        data_collator=RandomMask(tokenizer) if spec.has_random_collator else None,
        processing_class=tokenizer,
        peft_config=lora(spec),
        callbacks=[Planted(spec, OUTPUT)],
    )
    trainer.train(resume_from_checkpoint=True if spec.is_resumed else None)
    trainer.save_model("final")
