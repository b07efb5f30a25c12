"""The objective's ways to its loss: plain, biased and adapted heads, smoothing, soft caps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy
from transformers import CohereConfig, Gemma2Config, LlamaConfig, PhiConfig

from conftest import TINY_SIZES
from tunesmith.config.objective import SftConfig
from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.load import random_model
from tunesmith.objectives import lm
from tunesmith.objectives.lm import SftObjective, decode, supervised_logp
from tunesmith.types import PackedBatch

SIZES = {**TINY_SIZES, "pad_token_id": 0}
FULL = FullConfig(name="full")
MODELS = {
    "tied head": (LlamaConfig(**SIZES, tie_word_embeddings=True), FULL),
    "own head": (LlamaConfig(**SIZES, tie_word_embeddings=False), FULL),
    "biased head": (PhiConfig(**SIZES, resid_pdrop=0.0), FULL),
    "soft cap": (Gemma2Config(**SIZES, query_pre_attn_scalar=8), FULL),
    "scale": (CohereConfig(**SIZES, logit_scale=0.3), FULL),
    "frozen head": (LlamaConfig(**SIZES), LoraConfig(rank=4, alpha=8.0)),
    "adapted head": (
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        LoraConfig(rank=4, alpha=8.0, target=["q_proj", "lm_head"]),
    ),
}


@pytest.fixture
def batch() -> PackedBatch:
    rng = np.random.default_rng(0)

    def sequence(length: int, *runs: tuple[int, int, float]) -> TokenSequence:
        return TokenSequence(rng.integers(1, 101, length).astype(np.int32), runs)

    runs = [(9, (4, 5, 1.0)), (7, (2, 2, 0.5)), (3, (0, 3, 0.25)), (4,)]
    return build_batch([(i, sequence(length, *of)) for i, (length, *of) in enumerate(runs)])


def build(config: Any, method: Any) -> Any:
    torch.manual_seed(0)
    model = attach(random_model(config, is_bf16=False).double(), method).double()
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def plain_loss(model: Any, batch: PackedBatch, smoothing: float, z_loss: float) -> torch.Tensor:
    """Logits by the model's own head, torch's cross-entropy, the z-loss by its formula."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits = base.get_output_embeddings()(decode(base, batch))[batch.row_N]
    if base.config.model_type == "cohere":
        logits = logits * base.config.logit_scale
    if base.config.model_type == "gemma2":
        cap = base.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    loss = cross_entropy(logits, batch.target_N, label_smoothing=smoothing, reduction="none")
    loss = loss + z_loss * logits.logsumexp(-1) ** 2
    return (loss * batch.weight_N).sum()


@pytest.mark.parametrize("extra", [(0.0, 0.0), (0.1, 1e-2)], ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_plain_way(
    name: str, extra: tuple[float, float], batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "CHUNK_BYTES", 3 * 4 * 101)  # several chunks for an adapted head
    model = build(*MODELS[name]).train()
    tensors = [parameter for _, parameter in trainable_parameters(model)]
    expected = plain_loss(model, batch, *extra)
    expected_grads = torch.autograd.grad(expected, tensors, allow_unused=True)
    loss = SftObjective(*extra).step(model, batch).loss_sum
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    # Rotary tables and norms of transformers are fp32 in places: the same on both sides.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_a_measured_model_has_no_smoothing(name: str, batch: PackedBatch) -> None:
    model = build(*MODELS[name])
    smoothed, plain = SftObjective(0.1, 1e-2), SftObjective()
    with torch.no_grad():
        assert smoothed.step(model.train(), batch).loss_sum != plain.step(model, batch).loss_sum
        measured = smoothed.step(model.eval(), batch).loss_sum
    torch.testing.assert_close(measured, plain.step(model, batch).loss_sum.detach())


@pytest.mark.parametrize("name", MODELS)
def test_dft_weighs_each_token_with_its_own_probability(name: str, batch: PackedBatch) -> None:
    """arXiv 2508.05629: the gradient of a token's loss times its probability, a constant."""
    model = build(*MODELS[name]).train()
    tensors = [parameter for _, parameter in trainable_parameters(model)]
    result = SftObjective(variant="dft").step(model, batch)
    grads = torch.autograd.grad(result.loss_sum, tensors, allow_unused=True)
    with torch.no_grad():
        p_N = supervised_logp(model, batch).exp()
    weighted = replace(batch, weight_N=batch.weight_N * p_N)
    expected = plain_loss(model, weighted, 0.0, 0.0)
    expected_grads = torch.autograd.grad(expected, tensors, allow_unused=True)
    torch.testing.assert_close(result.loss_sum, expected, rtol=0, atol=1e-11)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    with torch.no_grad():
        measured = SftObjective(variant="dft").step(model.eval(), batch).loss_sum
    plain = SftObjective().step(model, batch).loss_sum.detach()
    torch.testing.assert_close(measured, plain, rtol=0, atol=0)


@pytest.mark.parametrize("other", [{"label_smoothing": 0.1}, {"z_loss": 1e-4}])
def test_dft_stands_alone(other: dict[str, float]) -> None:
    assert SftConfig.model_validate({"variant": "dft"}).variant == "dft"
    with pytest.raises(ValidationError, match="`variant: dft` without"):
        SftConfig.model_validate({"variant": "dft", **other})


@pytest.mark.parametrize("name", MODELS)
def test_logp_is_the_plain_loss_row_by_row(name: str, batch: PackedBatch) -> None:
    model = build(*MODELS[name])
    logp_N = supervised_logp(model, batch)
    loss = -(logp_N * batch.weight_N).sum()
    torch.testing.assert_close(loss, plain_loss(model, batch, 0.0, 0.0), rtol=0, atol=1e-11)


def test_another_way_through_the_decoder_is_taken(batch: PackedBatch) -> None:
    model = build(*MODELS["own head"])

    class Halved:
        def decode(self, base: Any, batch: PackedBatch) -> torch.Tensor:
            return decode(base, batch) / 2

    with torch.no_grad():
        plain, halved = supervised_logp(model, batch), supervised_logp(model, batch, Halved())
        step = SftObjective(trunk=Halved()).step(model, batch)
    assert not torch.equal(plain, halved)
    torch.testing.assert_close(step.loss_sum, -(halved * batch.weight_N).sum())
