"""New tokens: tokenizer, embeddings, what is trained of them, and plain PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.config.load import recipe_from, recipe_with
from tunesmith.config.method import AdapterConfig, LoraConfig
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.errors import RecipeError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.load import find_model, load_config, load_model, load_tokenizer
from tunesmith.model.vocabulary import NewTokens, extend_tokenizer, make_room, with_new_tokens
from tunesmith.train import train
from tunesmith.types import SilentReporter

QUIET = SilentReporter()


def source_of(folder: Path, **values: Any) -> Any:
    return find_model(ModelConfig(id=str(folder), **values), QUIET)


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(make_tiny_config(tie_word_embeddings=False)).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


def test_new_rows_are_the_mean_of_the_old_ones(untied_folder: Path) -> None:
    source = source_of(untied_folder, new_tokens=["<tool>"], new_special_tokens=["<|think|>"])
    plain, model = load_model(source_of(untied_folder)), load_model(source)
    tokenizer = load_tokenizer(source)
    assert tokenizer.convert_tokens_to_ids(["<|think|>", "<tool>"]) == [259, 260]
    assert "<tool>" not in tokenizer.all_special_tokens
    assert "<|think|>" in tokenizer.all_special_tokens
    assert load_config(source).vocab_size == model.config.vocab_size == 261
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before_VH, after_VH = getattr(plain, get)().weight, getattr(model, get)().weight
        assert torch.equal(after_VH[:259], before_VH)
        expected_H = before_VH.float().mean(0)
        torch.testing.assert_close(after_VH[259:], expected_H.expand(2, -1))


def test_rows_are_padded_and_never_fewer(untied_folder: Path) -> None:
    source = source_of(untied_folder, new_tokens=["<tool>"], pad_vocabulary_to=64)
    assert load_model(source).get_input_embeddings().weight.shape[0] == 320
    assert load_config(source).vocab_size == 320
    assert NewTokens(("x",)).num_rows(300, 260) == 300
    assert not NewTokens()


def test_a_token_that_is_there_is_named(byte_tokenizer: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        extend_tokenizer(byte_tokenizer, NewTokens(special=("<|im_start|>",)))
    assert caught.value.code == "recipe.known-token"
    assert "token 257" in caught.value.found
    with pytest.raises(ValueError, match="differ"):
        ModelConfig(id="m", new_tokens=["a", "a"])


def recipe_of(method: object, **model: Any) -> Recipe:
    return recipe_from({"model": {"id": "m", **model}, "data": "d", "method": method})  # type: ignore[dict-item]


def test_which_methods_train_new_tokens(byte_tokenizer: Any) -> None:
    new = NewTokens(("<tool>",))
    extend_tokenizer(byte_tokenizer, new)
    found = with_new_tokens(recipe_of({"train_tokens": [3]}), byte_tokenizer, new).method
    assert isinstance(found, LoraConfig)
    assert found.train_tokens == [3, 259]
    tokens = with_new_tokens(recipe_of("trainable_tokens"), byte_tokenizer, new).method
    assert isinstance(tokens, AdapterConfig)
    assert tokens.settings["token_indices"] == [259]
    for method in ("full", {"name": "freeze", "embeddings": True}):
        with_new_tokens(recipe_of(method), byte_tokenizer, new)
    for method in ("ia3", "freeze", "prompt_tuning"):
        with pytest.raises(RecipeError) as caught:
            with_new_tokens(recipe_of(method), byte_tokenizer, new)
        assert caught.value.code == "recipe.new-tokens"
    with pytest.raises(RecipeError, match="pad_vocabulary_to"):
        with_new_tokens(recipe_of("lora"), byte_tokenizer, NewTokens(multiple=8))


def test_what_lora_trains_of_a_vocabulary(untied_folder: Path, tiny_model_folder: Path) -> None:
    def shapes(folder: Path, **values: Any) -> dict[str, tuple[int, ...]]:
        method = LoraConfig(rank=2, alpha=4.0, target=["q_proj"], train_tokens=[5, 3], **values)
        model = attach(load_model(source_of(folder)), method)
        found = trainable_parameters(model)
        assert all(parameter.dtype == torch.float32 for _, parameter in found)
        return {n: tuple(p.shape) for n, p in found if "lora" not in n}

    tied = shapes(tiny_model_folder)
    assert list(tied.values()) == [(2, 32)]
    assert sorted(shapes(untied_folder).values()) == [(2, 32), (2, 32)]
    mixed = shapes(untied_folder, train_modules=["embed_tokens"])
    assert sorted(mixed.values()) == [(2, 32), (259, 32)]
    with pytest.raises(RecipeError, match="train_tokens"):
        attach(
            load_model(source_of(untied_folder)), LoraConfig(rank=2, alpha=1.0, train_tokens=[259])
        )


ROWS = [
    {"messages": [{"role": "user", "content": f"use {n}"}, {"role": "assistant", "content": c}]}
    for n, c in enumerate(["<tool>one", "two<tool>", "<tool><tool>", "none at all"] * 4)
]


def run(folder: Path, data: Path, output: Path, method: object, **model: Any) -> Path:
    tree: dict[str, Any] = {
        "model": {"id": str(folder), "dtype": "float32", "new_tokens": ["<tool>"], **model},
        "data": {"path": str(data), "validation": 4},
        "method": method,
        "train": {"epochs": 2, "global_batch": 4, "learning_rate": 0.01},
        "checkpoint": {"every_steps": 2, "keep": 4},
        "output": str(output),
    }
    train(recipe_with(tree, []))
    return output


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


METHODS: dict[str, Any] = {
    "lora": {"name": "lora", "rank": 4},
    "pissa": {"name": "pissa", "rank": 4},
    "embed": {"name": "lora", "rank": 4, "train_modules": ["embed_tokens", "lm_head"]},
    "tokens": "trainable_tokens",
    "full": "full",
    "freeze": {"name": "freeze", "embeddings": True},
}


CASES = [(name, is_tied) for name in METHODS for is_tied in (True, False)]
QUICK = [("lora", True)]


@pytest.mark.parametrize(
    ("name", "is_tied"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_results_load_plainly(
    name: str,
    is_tied: bool,
    tiny_model_folder: Path,
    untied_folder: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
) -> None:
    """In transformers or PEFT and in `tunesmith chat`, with the same logits; a resumed run too."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model_folder if is_tied else untied_folder
    data = write_jsonl(ROWS)
    done = run(base, data, tmp_path / "done", METHODS[name])
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    ids = tokenizer("a <tool> b")["input_ids"]
    assert 259 in ids
    is_adapter = (done / "model" / "adapter_config.json").exists()
    kind: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    plain = logits(kind.from_pretrained(str(done / "model")), ids)
    assert plain.shape[-1] == 260
    chat = open_chat_model(str(done), QUIET)
    assert torch.equal(logits(chat.model.cpu(), ids), plain)
    start = logits(load_model(source_of(base, new_tokens=["<tool>"])), ids)
    assert (plain - start).abs().max() > 1e-3

    half = tmp_path / "half"
    shutil.copytree(done, half)
    for part in ("model", "loss.png", "summary.json"):
        path = half / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    steps = sorted((half / "checkpoints").iterdir())
    assert len(steps) > 1
    for later in steps[1:]:
        shutil.rmtree(later)
    for file in ("recipe.yaml", "recipe.resolved.yaml"):
        text = (half / file).read_text().replace(str(done), str(half))
        (half / file).write_text(text)
    run(base, data, half, METHODS[name])
    again = kind.from_pretrained(str(half / "model"))
    assert torch.equal(logits(again, ids), plain)


def test_the_file_of_an_adapter_has_rows_for_new_tokens_alone(
    tiny_model_folder: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file

    done = run(tiny_model_folder, write_jsonl(ROWS), tmp_path / "done", {"rank": 4})
    stored = load_file(done / "model" / "adapter_model.safetensors")
    assert not any("embed_tokens.weight" in name for name in stored)
    settings = json.loads((done / "model" / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"embed_tokens": [259]}


def test_room_is_made_once(tiny_model_folder: Path) -> None:
    model = load_model(source_of(tiny_model_folder))
    make_room(model, 100)
    assert model.config.vocab_size == 259
    make_room(model, 262)
    assert model.config.vocab_size == 262
