"""Finding and loading models: every wrong place has its own message."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.recipe import FullConfig, LoraConfig, ModelConfig, Recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.adapters import attach, load_weights, save_weights, trainable_parameters
from tunesmith.model.builtin import find_builtin
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.model.memory import estimate_needs, measure_config
from tunesmith.types import SilentReporter

LORA = LoraConfig(name="lora", rank=4, alpha=8.0)


def find(model_id: str, folder: Path | None = None) -> ModelSource:
    return find_model(ModelConfig(id=model_id), SilentReporter(), folder)


def test_a_folder_beside_the_recipe(tiny_model_folder: Path) -> None:
    source = find("model", tiny_model_folder.parent)
    assert source.path == str(tiny_model_folder)
    check_weights_exist(source)
    assert load_tokenizer(source).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("model_id", "code"),
    [
        ("./nowhere", "model.missing"),
        ("nowhere.gguf", "model.missing"),
        ("builtin:gpt5", "model.unknown-builtin"),
        ("two words", "model.missing"),
    ],
)
def test_nothing_there(model_id: str, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        find(model_id)
    assert caught.value.code == code


def test_a_near_name_is_offered(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean"):
        find(str(tiny_model_folder.parent / "modle"))


def test_a_hub_id_is_taken_as_it_is_and_said_when_it_cannot_be_reached() -> None:
    source = find("no-such-org/no-such-model")
    assert not source.is_local
    check_weights_exist(source)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(source)
    assert caught.value.code == "model.hub"
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.is-adapter"):
        check_weights_exist(find(str(tmp_path)))


def test_a_folder_with_a_gguf_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name the file: .*weights\.gguf"):
        check_weights_exist(find(str(tmp_path)))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ModelError, match=r"model\.bad-gguf.*PK"):
        convert_gguf(file, SilentReporter())


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model\.not-a-model"):
        find(str(tmp_path / "model.bin"))


def test_unknown_builtin_lists_the_known() -> None:
    with pytest.raises(ModelError, match="builtin:smollm2-135m"):
        find_builtin("builtin:other")


@pytest.mark.parametrize("method", [LORA, FullConfig(name="full")])
def test_saved_weights_come_back_bit_for_bit(
    tiny_model_folder: Path, tmp_path: Path, method: Any
) -> None:
    source = ModelSource("tiny", str(tiny_model_folder))
    model = attach(load_model(source, dtype="float32"), method)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    saved = {name: p.detach().clone() for name, p in trainable_parameters(model)}
    save_weights(model, tmp_path)
    fresh = attach(load_model(source, dtype="float32"), method)
    load_weights(fresh, tmp_path)
    for name, parameter in trainable_parameters(fresh):
        assert torch.equal(parameter, saved[name]), name


def test_other_names_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = ModelSource("tiny", str(tiny_model_folder))
    save_weights(attach(load_model(source), LORA), tmp_path)
    other = LORA.model_copy(update={"target": ["q_proj"]})
    with pytest.raises(ValueError, match="unknown"):
        load_weights(attach(load_model(source), other), tmp_path)


def test_lora_trains_its_adapters_alone(tiny_model_folder: Path) -> None:
    model = attach(load_model(ModelSource("tiny", str(tiny_model_folder))), LORA)
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert all("lora_" in name for name in names)


def test_sizes_equal_those_of_the_real_model(tiny_model_folder: Path) -> None:
    source = ModelSource("tiny", str(tiny_model_folder))
    sizes = measure_config(load_config(source), LORA)
    model = attach(load_model(source), LORA)
    trained = sum(p.numel() for _, p in trainable_parameters(model))
    assert sizes.num_trained == trained
    assert sizes.num_parameters == sum(p.numel() for p in model.parameters()) - trained
    recipe = Recipe.model_validate({"model": "m", "data": "d"})
    assert estimate_needs(sizes, recipe, is_bf16=False).weight_bytes == 4 * sizes.num_parameters


def test_a_target_that_fits_nothing_is_found_without_weights(tiny_model_folder: Path) -> None:
    method = LORA.model_copy(update={"target": ["nothing"]})
    with pytest.raises(RecipeError, match="q_proj"):
        measure_config(load_config(ModelSource("tiny", str(tiny_model_folder))), method)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapted_embeddings_and_heads_come_back_too(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = ModelSource("tiny", str(tiny_model_folder))
    method = LORA.model_copy(update={"target": ["q_proj", "embed_tokens"]})
    model = attach(load_model(source, dtype="float32"), method)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    save_weights(model, tmp_path)
    fresh = attach(load_model(source, dtype="float32"), method)
    load_weights(fresh, tmp_path)
    for (name, ours), (_, theirs) in zip(
        trainable_parameters(fresh), trainable_parameters(model), strict=True
    ):
        assert torch.equal(ours, theirs), name
