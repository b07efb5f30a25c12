"""Models of true shapes with random weights, and rows of equal lengths, for the GPU benchmark.

A language model's cost does not depend on what it has learned, but on its shape, and a little on
its numbers: logits must not be all equal. Every matrix is drawn with a deviation of 1 / sqrt(hidden
size), so that the logits, products of normed states and the head's rows, deviate by about 1.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {  # Qwen2.5-0.5B
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "3b": {  # Llama-3.2-3B
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama-3.1-8B
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""What the models' own config.json say."""

CONTEXT_TOKENS = 131072

END = "<|end|>"

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '" + END + "' }}{% endfor %}"


def model_config(sizes: dict[str, Any]) -> Any:
    """The shape as transformers' configuration."""
    from transformers import AutoConfig

    values = {key: value for key, value in sizes.items() if key != "model_type"}
    return AutoConfig.for_model(
        sizes["model_type"],
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=sizes["hidden_size"] ** -0.5,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
        **values,
    )


def make_model(folder: Path, sizes: dict[str, Any], device: str, seed: int) -> None:
    """Draws the weights on the device and writes the folder of a bfloat16 model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(model_config(sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """One token a byte, so that a row's length is known before it is tokenized."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_rows(path: Path, count: int, row_tokens: int, seed: int) -> None:
    """Rows of prompt and completion, half and half, of so many tokens with the end token."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(generator.choices(string.ascii_lowercase, k=row_tokens - 1))
            row = {"prompt": text[: row_tokens // 2], "completion": text[row_tokens // 2 :]}
            file.write(json.dumps(row) + "\n")
