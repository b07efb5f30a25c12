"""Fixtures: a byte tokenizer and a tiny model made in code; the shared folder if it is there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Shells start background jobs with SIGINT ignored, nohup with SIGHUP: children would be deaf.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TINY_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token stores of tests stay out of the user's cache."""
    # The built-in model's conversion takes 20 s; a cache named from outside keeps it.
    if "TUNESMITH_TEST_CACHE" in os.environ:
        os.environ["TUNESMITH_CACHE"] = os.environ["TUNESMITH_TEST_CACHE"]
    else:
        os.environ["TUNESMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared with real data and tokenizers is not here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizers_folder(shared: Path) -> Path:
    """Real tokenizers: qwen3, llama3_1, deepseek_v3."""
    return shared / "tokenizers"


def make_byte_tokenizer() -> Any:
    """A byte-level tokenizer of 259 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def byte_tokenizer() -> Any:
    return make_byte_tokenizer()


def make_tiny_config(vocab_size: int = 259, **changes: Any) -> Any:
    """A Llama of two layers, 32 wide, with grouped heads and a tied head."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": 258,
        "bos_token_id": None,
        "pad_token_id": 256,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the byte tokenizer, as a folder that tunesmith can train on."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(make_tiny_config()).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and gives the file."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def make_rows(count: int) -> list[dict[str, Any]]:
    """Small conversations of different lengths, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {index}" + "?" * (index % 7)},
                {"role": "assistant", "content": f"answer {index * index}" + "!" * (index % 5)},
            ]
        }
        for index in range(count)
    ]


def write_tiny_recipe(folder: Path, model: Path, *, rows: int = 40, **changes: Any) -> Path:
    """A recipe that trains the tiny model for 20 steps in under a second."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(rows)), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"id": str(model), "dtype": "float32"},
        "data": {"train": str(data), "validation": 0.2},
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "train": {
            "epochs": 5,
            "global_batch": 8,
            "micro_batch_tokens": 128,
            "learning_rate": 0.01,
        },
        "checkpoint": {"every_steps": 3, "keep": 2},
        "evaluate": {"samples": 0, "general": None},  # tests of these ask for them
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(recipe.get(key), dict):
            recipe[key] = {**recipe[key], **value}
        else:
            recipe[key] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture
def tiny_recipe(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes such a recipe into the test's folder; runs in this process leave out their reports."""
    monkeypatch.setattr("tunesmith.results.write_report", lambda folder: folder)
    return partial(write_tiny_recipe, tmp_path, tiny_model_folder)
