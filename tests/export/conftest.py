"""Tiny trained models to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.export.trained import Trained
from tunesmith.model.heads import Head
from tunesmith.model.load import ModelSource


def stir(model: Any) -> None:
    """Gives an untrained adapter values, so that it changes something."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.fixture
def make_trained(tmp_path: Path) -> Callable[..., Trained]:
    """Saves a tiny base and an adapter on it, and gives what an export starts from."""

    def make(
        adapter: Any = None, *, head: Head | None = None, new: tuple[str, ...] = (), **config: Any
    ) -> Trained:
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        base, tuned = tmp_path / "base", tmp_path / "adapter"
        torch.manual_seed(0)
        values = make_tiny_config(**config)
        tokenizer = make_byte_tokenizer()
        AutoModelForCausalLM.from_config(values).save_pretrained(base)
        tokenizer.save_pretrained(base)
        if new:
            tokenizer.add_tokens(list(new))
        kind = AutoModelForCausalLM
        if head is not None:
            kind = AutoModelForSequenceClassification
            values.num_labels = len(head.names)
        if adapter is not None:
            model: Any = kind.from_pretrained(base, config=values if head else None)
            if new:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model = get_peft_model(model, adapter)
            stir(model)
            model.save_pretrained(tuned, **({"save_embedding_layers": False} if new else {}))
            tokenizer.save_pretrained(tuned)
        return Trained(
            label="tiny",
            base=ModelSource("tiny", str(base)),
            adapter=tuned if adapter is not None else None,
            tokenizer=tokenizer,
            head=head,
            stop_ids=(258, 256),
            base_name="tiny-base",
        )

    return make
