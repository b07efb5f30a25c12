"""What each method trains, what is saved of it, and that nothing below it costs anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import TINY_SIZES
from tunesmith.config.recipe import FreezeConfig, FullConfig, LoraConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.errors import RecipeError
from tunesmith.model.adapters import (
    TRAINED_FILE,
    TrainedWeights,
    attach,
    load_weights,
    save_weights,
    trainable_parameters,
)
from tunesmith.model.layers import decoder_of, first_trainable_layer
from tunesmith.model.load import random_model
from tunesmith.objectives.lm import SftObjective
from tunesmith.types import PackedBatch

SIZES = {**TINY_SIZES, "num_hidden_layers": 4, "pad_token_id": 0}
FULL = FullConfig(name="full")


def freeze(**values: Any) -> FreezeConfig:
    return FreezeConfig(name="freeze", **values)


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, **values})


def build(method: Any, *, is_tied: bool = True, is_bf16: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=is_tied)
    return attach(random_model(config, is_bf16=is_bf16), method)


@pytest.fixture
def batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    return build_batch(
        [
            (n, TokenSequence(rng.integers(1, 101, n).astype(np.int32), ((2, n - 2, 1.0),)))
            for n in (9, 7, 5)
        ]
    )


def places(model: Any) -> set[str]:
    """Layer numbers, and names of what else is trained."""
    found: set[str] = set()
    for name, _ in trainable_parameters(model):
        _, is_layer, rest = name.partition(".layers.")
        found.add(rest.partition(".")[0] if is_layer else name)
    return found


@pytest.mark.parametrize(
    ("method", "trained", "first"),
    [
        (freeze(), {"2", "3", "model.norm.weight"}, 2),
        (freeze(layers=1, norm=False), {"3"}, 3),
        (freeze(layers=1, head=True), {"3", "model.norm.weight", "lm_head.weight"}, 3),
        (freeze(layers=4, norm=False), {"0", "1", "2", "3"}, 0),
        (lora(layers=2), {"2", "3"}, 2),
        (lora(layers=1, target=["q_proj", "down_proj"]), {"3"}, 3),
        (lora(layers=1, target=r".*\.(k|v)_proj"), {"3"}, 3),
        (lora(layers=4), {"0", "1", "2", "3"}, 0),
        (lora(), {"0", "1", "2", "3"}, 0),
    ],
)
def test_what_is_trained(method: Any, trained: set[str], first: int) -> None:
    model = build(method, is_tied=False)
    assert places(model) == trained
    assert first_trainable_layer(model) == first


def test_first_trainable_layer_of_odd_choices() -> None:
    model = build(freeze(layers=1), is_tied=False)
    decoder = decoder_of(model)
    decoder.layers.requires_grad_(False)
    assert first_trainable_layer(model) == 4
    decoder.embed_tokens.requires_grad_(True)
    assert first_trainable_layer(model) == 0
    assert first_trainable_layer(build(FULL)) == 0


@pytest.mark.parametrize("method", [freeze(layers=5), lora(layers=5)])
def test_more_layers_than_there_are(method: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        build(method)
    assert caught.value.code == "recipe.layers"
    assert "at most 4" in str(caught.value)


def test_a_tied_head_is_not_trained_alone() -> None:
    with pytest.raises(RecipeError) as caught:
        build(freeze(head=True), is_tied=True)
    assert caught.value.code == "recipe.tied-head"


def test_a_bfloat16_model_trains(batch: PackedBatch) -> None:
    model = build(freeze(), is_bf16=True).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SftObjective().step(model, batch).loss_sum
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(model))


# Weights


def changed(model: Any) -> dict[str, torch.Tensor]:
    """Moves what is trained, and returns all weights."""
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(model: Any, folder: Path) -> None:
    TrainedWeights(model).writer(copies=False)(folder)


def write_copies(model: Any, folder: Path) -> None:
    """Writes what was there before the weights went on moving."""
    before = {n: p.detach().clone() for n, p in trainable_parameters(model)}
    writer = TrainedWeights(model).writer(copies=True)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(1)
    writer(folder)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            parameter.copy_(before[name])


@pytest.mark.parametrize("save", [write, write_copies, save_weights])
@pytest.mark.parametrize("method", [freeze(), lora(layers=2), lora(), FULL], ids=str)
@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_come_back_bit_for_bit(
    method: Any, is_tied: bool, save: Any, tmp_path: Path
) -> None:
    model = build(method, is_tied=is_tied)
    expected = changed(model)
    save(model, tmp_path)
    again = build(method, is_tied=is_tied)
    load_weights(again, tmp_path)
    found = again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_leaves_frozen_weights_out(tmp_path: Path) -> None:
    model = build(freeze(layers=1))
    write(model, tmp_path / "checkpoint")
    save_weights(model, tmp_path / "model")
    (kept,) = (tmp_path / "checkpoint").iterdir()
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    assert kept.name == TRAINED_FILE
    assert kept.stat().st_size == pytest.approx(4 * trained, rel=0.1)
    with pytest.raises(ValueError, match="missing"):
        load_weights(build(freeze(layers=2)), tmp_path / "checkpoint")


def test_the_result_is_a_whole_model(tmp_path: Path) -> None:
    model = build(freeze(layers=1))
    expected = changed(model)
    save_weights(model, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_peft_reads_adapters_of_some_layers(tmp_path: Path, batch: PackedBatch) -> None:
    from peft import PeftModel

    model = build(lora(layers=1))
    changed(model)
    save_weights(model, tmp_path)
    assert "layers" in json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"]
    torch.manual_seed(0)
    plain = random_model(LlamaConfig(**SIZES, tie_word_embeddings=True), is_bf16=False)
    again = PeftModel.from_pretrained(plain, str(tmp_path))
    losses = [SftObjective().step(each.eval(), batch).loss_sum.detach() for each in (model, again)]
    assert torch.equal(losses[0], losses[1])


# Cost below the first trained layer


class Watch:
    """What the forward keeps, and whether a gradient comes, in and below each layer."""

    def __init__(self, model: Any) -> None:
        self.current = -1
        self.kept: dict[int, int] = {}
        self.needs_grad: dict[int, bool] = {}
        for number, layer in enumerate(decoder_of(model).layers):
            layer.register_forward_pre_hook(lambda _, args, n=number: self._enter(n, args[0]))
            layer.register_forward_hook(lambda *_: self._leave())

    def _enter(self, number: int, hidden: torch.Tensor) -> None:
        self.current = number
        self.needs_grad[number] = hidden.requires_grad

    def _leave(self) -> None:
        self.current = -1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept[self.current] = self.kept.get(self.current, 0) + tensor.numel()
        return tensor


@pytest.mark.parametrize("method", [freeze(layers=2), lora(layers=2), lora()], ids=str)
def test_layers_below_keep_nothing_and_get_no_gradient(method: Any, batch: PackedBatch) -> None:
    model = build(method).train()
    first = first_trainable_layer(model)
    watch = Watch(model)
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        loss = SftObjective().step(model, batch).loss_sum
    loss.backward()
    assert {n for n in watch.kept if n >= 0} == set(range(first, 4))
    # The input of the first trained layer needs no gradient either.
    assert watch.needs_grad == {n: n > first for n in range(4)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
