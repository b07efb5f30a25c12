"""A model that would mix samples, or look ahead, is refused before it trains."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, GptOssConfig, LlamaConfig, Qwen3Config

from conftest import TINY_SIZES
from tunesmith.errors import ModelError
from tunesmith.model.load import random_model
from tunesmith.model.packing import check_packing


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig(**TINY_SIZES), Qwen3Config(**TINY_SIZES)])
def test_kin_of_llama_pass(config: Any, is_bf16: bool) -> None:
    torch.manual_seed(0)
    check_packing(random_model(config, is_bf16=is_bf16).eval(), "mine")


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),
        GptOssConfig(**TINY_SIZES, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=["own attention without a mask", "attention sinks"],
)
def test_others_are_refused(config: Any) -> None:
    torch.manual_seed(0)
    model = random_model(config, is_bf16=False).eval()
    with pytest.raises(ModelError) as caught:
        check_packing(model, "mine")
    assert caught.value.code == "model.no-packing"
