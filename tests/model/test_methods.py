"""Each method on a tiny model: attaches, learns, equals PEFT's own forward, loads in plain PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from conftest import TINY_SIZES
from tunesmith.config.adapter_kinds import ADAPTER_KINDS, PROMPT_KINDS, TUNER_KINDS
from tunesmith.config.method import (
    AdapterConfig,
    FreezeConfig,
    LoraConfig,
    Method,
    base_learning_rate,
)
from tunesmith.config.recipe import TrainConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.engine.optimizer import build_optimizer
from tunesmith.errors import RecipeError
from tunesmith.io import safeload
from tunesmith.model.adapters import (
    TrainedWeights,
    attach,
    load_weights,
    save_weights,
    trainable_parameters,
)
from tunesmith.model.embeddings import behind, install_noise, noise
from tunesmith.model.fast_path import make_fast
from tunesmith.model.layers import decoder_of, first_trainable_layer
from tunesmith.model.load import random_model
from tunesmith.model.load_adapter import load_adapter
from tunesmith.model.memory import measure_config
from tunesmith.objectives.lm import SftObjective, decode
from tunesmith.types import PackedBatch, Segments

SIZES = {**TINY_SIZES, "pad_token_id": 0}
LENGTHS = (9, 7, 5)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
WITH_BIASES = Qwen2Config(**SIZES, tie_word_embeddings=False)


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, **values})


SETTINGS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "PSOFT": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 7, 50, 60, 70]},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "WAVEFT": {"n_frequency": 30},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "VERA": {"r": 16},
}


def adapter(kind: str, **values: Any) -> AdapterConfig:
    return AdapterConfig(name="adapter", kind=kind, **{**SETTINGS.get(kind, {}), **values})


LORAS = {
    "rslora": lora(rslora=True, alpha=4.0),
    "dora": lora(dora=True),
    "gaussian": lora(init="gaussian"),
    "orthogonal": lora(init="orthogonal"),
    "pissa": lora(init="pissa", alpha=4.0),
    "pissa_niter": lora(init="pissa_niter_16"),
    "olora": lora(init="olora"),
    "pissa of ranks": lora(init="pissa", rslora=True, rank_pattern={"q_proj": 8}),
    "pissa of a layer": lora(init="pissa", layers=1, bias="lora_only", train_modules=["lm_head"]),
    "patterns": lora(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3.5}),
    "biases": lora(bias="all"),
    "modules": lora(train_modules=["embed_tokens", "lm_head"]),
    "norms": lora(train_modules=["input_layernorm", "norm"]),
    "a module inside": lora(train_modules=["down_proj"], target=["q_proj"]),
}
KINDS = {kind: adapter(kind) for kind in ADAPTER_KINDS}
KINDS["PREFIX_TUNING projected"] = adapter("PREFIX_TUNING", prefix_projection=True)
METHODS: dict[str, Method] = {**LORAS, **KINDS}
QUICK = {"dora", "pissa of a layer", "modules", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"}
EACH = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]


def base_of(config: Any = TIED) -> Any:
    torch.manual_seed(0)
    return random_model(config, is_bf16=False)


@contextmanager
def quiet() -> Generator[None]:
    """Without PEFT's words on layers without a bias, on norms, and on CUDA that is not there."""
    layers = ("Detected that the base layer", "Unsupported layer type")
    with warnings.catch_warnings():
        for text in (*layers, "Failed to load the CUDA", "Setting boft_n_butterfly_factor"):
            warnings.filterwarnings("ignore", message=text)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def build(method: Method, config: Any = TIED) -> Any:
    with quiet():
        return attach(base_of(config), method)


@pytest.fixture
def batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 101, n).astype(np.int32) for n in LENGTHS]
    rows = [TokenSequence(ids, ((2, len(ids) - 2, 1.0),)) for ids in sequences]
    return build_batch(list(enumerate(rows)))


def learn(model: Any, method: Method, batch: PackedBatch, steps: int = 5) -> list[float]:
    """Losses of some steps; the rate is that of the recipe for a model 32 wide."""
    optimizer = build_optimizer(trainable_parameters(model), TrainConfig(), method)
    losses: list[float] = []
    for step in range(steps):
        model.train()
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = SftObjective().step(model, batch).loss_sum / batch.weight_N.sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(8 * base_learning_rate(method), torch.tensor(True))
    return losses


@contextmanager
def plain_attention(model: Any) -> Generator[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    yield model.eval()
    base.set_attn_implementation(before)


@torch.no_grad()
def plainly(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Logits of the model's own forward, one sequence at a time."""
    with plain_attention(model):
        each = [
            model(input_ids=ids[None]).logits[0, -len(ids) :] for ids in batch.ids_T.split(LENGTHS)
        ]
    return torch.cat(each)


@torch.no_grad()
def packed(model: Any, batch: PackedBatch) -> torch.Tensor:
    base = model.eval().get_base_model() if hasattr(model, "get_base_model") else model.eval()
    return base.get_output_embeddings()(decode(base, batch))


def name_base(folder: Path) -> None:
    """Writes down a base model, which one made in code does not have."""
    file = folder / "adapter_config.json"
    values = {**json.loads(file.read_text()), "base_model_name_or_path": "tiny/base"}
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("config", [TIED, pytest.param(WITH_BIASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EACH)
def test_a_method_learns_and_loads_in_plain_peft(
    name: str, config: Any, batch: PackedBatch, tmp_path: Path
) -> None:
    from peft import PeftModel

    method = METHODS[name]
    model = build(method, config)
    how = make_fast(model)
    assert not how.endswith(")") or "differs" not in how
    losses = learn(model, method, batch)
    assert losses[-1] < losses[0]
    found = plainly(model, batch)
    assert (found - plainly(base_of(config), batch)).abs().max() > 1e-3
    torch.testing.assert_close(packed(model, batch), found, rtol=1e-5, atol=1e-6)
    save_weights(model, tmp_path / "result")
    with quiet():
        again: Any = PeftModel.from_pretrained(base_of(config), str(tmp_path / "result"))
    exact = {} if "base_changes" in vars(model) else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(
        plainly(again, batch), found, **exact or {"rtol": 1e-5, "atol": 1e-6}
    )
    name_base(tmp_path / "result")
    with quiet():
        ours = load_adapter(base_of(config), tmp_path / "result", "result")
    assert torch.equal(plainly(ours, batch), plainly(again, batch))


@pytest.mark.parametrize("name", EACH)
def test_a_checkpoint_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = build(METHODS[name], WITH_BIASES)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    expected = {n: p.detach().clone() for n, p in trainable_parameters(model)}
    TrainedWeights(model).writer(copies=True)(tmp_path)
    again = build(METHODS[name], WITH_BIASES)
    load_weights(again, tmp_path)
    found = dict(trainable_parameters(again))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", EACH)
def test_plans_count_what_is_trained(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = measure_config(TIED, METHODS[name])
    model = build(METHODS[name])
    assert sizes.num_trained == sum(p.numel() for _, p in trainable_parameters(model))
    assert 2 - first_trainable_layer(model) == sizes.trained_layers


def test_which_lora_runs_in_our_own_forward() -> None:
    for name in ("rslora", "pissa", "patterns", "biases", "modules", "norms"):
        assert make_fast(build(LORAS[name])).startswith("own forward and backward for all"), name
    assert "PEFT alone" in make_fast(build(LORAS["dora"]))
    assert "layers" in make_fast(build(LORAS["a module inside"]))
    assert "forward of its own" in make_fast(build(KINDS["PREFIX_TUNING"]))


def test_adapters_of_all_kinds_are_known_to_the_loader() -> None:
    assert set(TUNER_KINDS) | {"LORA"} == safeload.TUNER_KINDS
    assert set(PROMPT_KINDS) == safeload.PROMPT_KINDS


# First values out of the frozen weights


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_file_of_pissa_is_plain_lora_of_twice_the_rank(
    init: Any, batch: PackedBatch, tmp_path: Path
) -> None:
    model = build(lora(init=init))
    torch.testing.assert_close(plainly(model, batch), plainly(base_of(), batch))  # nothing yet
    save_weights(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 8, True)
    assert not settings["rank_pattern"]


# What does not fit


@pytest.mark.parametrize(
    ("method", "code", "text"),
    [
        (adapter("IA3", target_module=["x"]), "recipe.unknown-key", "`target_modules`"),
        (adapter("OFT", oft_block_size=8, r=3), "recipe.adapter", "OFT"),
        (adapter("IA3", target_modules=["nothing"]), "recipe.adapter", "nothing"),
        (adapter("TRAINABLE_TOKENS", token_indices=[]), "recipe.adapter", "nothing is trained"),
        (adapter("PROMPT_TUNING", tokenizer_name_or_path="x"), "recipe.unknown-key", "tokenizer"),
        (adapter("PROMPT_TUNING", prompt_tuning_init="TEXT"), "recipe.adapter", "SAMPLE_VOCAB"),
        (lora(train_modules=["heads"]), "recipe.target", "heads"),
        (lora(target="("), "recipe.target", "'('"),
        (FreezeConfig(name="freeze", pattern="nothing"), "recipe.target", "nothing"),
        (FreezeConfig(name="freeze", pattern="("), "recipe.target", "no regular expression"),
    ],
)
def test_settings_that_do_not_fit(method: Method, code: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(method)
    assert caught.value.code == code
    assert text in str(caught.value)


# Freezing


@pytest.mark.parametrize(
    ("values", "trained"),
    [
        ({"first": 1}, {"layers.0."}),
        ({"pattern": r"layers\.1\..*norm"}, {"layers.1.input_layernorm.", "layers.1.post"}),
        ({"layers": 0, "embeddings": True}, {"embed_tokens"}),
        ({"layers": 1, "first": 1}, {"layers.0.", "layers.1.", "model.norm"}),
        ({"layers": 1, "embeddings": True, "head": True}, {"layers.1.", "model.norm", "embed"}),
    ],
)
def test_what_freezing_leaves(values: dict[str, Any], trained: set[str]) -> None:
    names = {n for n, _ in trainable_parameters(build(FreezeConfig(name="freeze", **values)))}
    assert names
    assert all(any(part in name for part in trained) for name in names)
    assert all(any(part in name for name in names) for part in trained)


# Virtual tokens and noise


def test_a_tree_of_segments_goes_on_from_the_virtual_tokens() -> None:
    table = behind(Segments((3, 2, 4), (-1, 0, -1)), 5)
    assert (table.lengths, table.parents) == ((5, 3, 2, 4), (-1, 0, 1, 0))
    assert behind(Segments((3, 2)), 1).parents == (-1, 0, 0)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_can_be_switched_off(kind: str, batch: PackedBatch) -> None:
    model = build(adapter(kind))
    with model.disable_adapter():
        torch.testing.assert_close(packed(model, batch), packed(base_of(), batch))
    assert (packed(model, batch) - packed(base_of(), batch)).abs().max() > 1e-3


def test_noise_is_drawn_while_training_alone(batch: PackedBatch) -> None:
    model = build(lora())
    install_noise(model, 5.0)
    torch.testing.assert_close(packed(model, batch), packed(base_of(), batch), rtol=0, atol=0)
    decoder = decoder_of(model.train())

    def hidden(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return decode(model.get_base_model(), batch)

    assert torch.equal(hidden(1), hidden(1))
    assert not torch.equal(hidden(1), hidden(2))
    assert "forward" in vars(decoder)
    both = build(adapter("PROMPT_TUNING"))
    before = packed(both, batch)
    install_noise(both, 5.0)
    assert torch.equal(packed(both, batch), before)
    assert decoder_of(both).forward.noise_alpha == 5.0


def test_noise_is_as_large_as_the_paper_says() -> None:
    """Uniform in +-alpha / sqrt(L d), L the tokens of the sequence."""
    torch.manual_seed(0)
    found = noise(torch.zeros(1, 100, 64), Segments((10, 90)), alpha=4.0)[0]
    for part, length in zip(found.split((10, 90)), (10, 90), strict=True):
        bound = 4.0 / (length * 64) ** 0.5
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.98 * bound
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.1)
