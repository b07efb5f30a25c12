"""Packed is the same as one by one: loss and every gradient, fp64, 1e-9."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from conftest import TINY_SIZES
from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.data import prefixes
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.load import PACKED_ATTENTION, random_model
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.lm import supervised_logp

SIZES = {**TINY_SIZES, "pad_token_id": 0}
CONFIGS = {
    "llama, tied head": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2, biased q k v": Qwen2Config(**SIZES),
    "qwen3, normed q k": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2, soft caps and a window": Gemma2Config(
        **SIZES, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
}
METHODS = {
    "full": FullConfig(name="full"),
    "lora": LoraConfig(name="lora", rank=4, alpha=8.0),
}


def make_sequences() -> list[tuple[int, TokenSequence]]:
    """Several lengths, a length of 1, two answers in one, fractions of weight, and no answer."""
    rng = np.random.default_rng(0)

    def sequence(length: int, *runs: tuple[int, int, float]) -> TokenSequence:
        return TokenSequence(rng.integers(1, 101, length).astype(np.int32), runs)

    return [
        (0, sequence(9, (4, 5, 1.0))),
        (1, sequence(9, (2, 2, 1.0), (7, 2, 0.5))),
        (2, sequence(1)),
        (3, sequence(6)),  # no supervised token
        (4, sequence(5, (0, 5, 1.0))),  # its first token has no predictor
        (5, sequence(1, (0, 1, 1.0))),
        (6, sequence(2, (1, 1, 1.0))),
    ]


def build(config: Any, method: Any) -> Any:
    torch.manual_seed(0)
    model = attach(random_model(config, is_bf16=False).double(), method).double()
    if method.name == "lora":
        # B starts at zero, which would hide mistakes in A's gradient.
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def one_by_one(model: Any, sequences: list[tuple[int, TokenSequence]]) -> torch.Tensor:
    """The plain way: each sample alone through transformers' own attention, labels of -100."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Eager attention takes its softmax in fp32, sdpa stays in fp64 but knows no soft cap.
    base.set_attn_implementation("eager" if base.config.model_type == "gemma2" else "sdpa")
    total = torch.zeros((), dtype=torch.float64)
    for _, sequence in sequences:
        ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
        logits = base(input_ids=ids).logits[0, :-1].double()
        for first, count, weight in sequence.runs:
            labels = torch.full_like(ids[0], -100)
            labels[first : first + count] = ids[0, first : first + count]
            if (labels[1:] != -100).any():
                total = total + weight * cross_entropy(logits, labels[1:], reduction="sum")
    base.set_attn_implementation(PACKED_ATTENTION)
    return total


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradients(config: Any, method: Any) -> None:
    model = build(config, method)
    sequences = make_sequences()
    tensors = [parameter for _, parameter in trainable_parameters(model)]
    tolerance = 1e-6 if config.model_type == "gemma2" else 1e-9

    expected = one_by_one(model, sequences)
    expected_grads = torch.autograd.grad(expected, tensors, allow_unused=True)
    loss = OBJECTIVES["sft"].make().step(model, build_batch(sequences)).loss_sum
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)

    assert float(expected.detach()) > 1.0
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for (name, _), ours, theirs in zip(
        trainable_parameters(model), grads, expected_grads, strict=True
    ):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_batch_without_supervised_tokens_has_loss_zero() -> None:
    model = build(CONFIGS["llama, tied head"], METHODS["lora"])
    batch = build_batch([item for item in make_sequences() if not item[1].runs])
    assert batch.row_N.numel() == 0
    assert OBJECTIVES["sft"].make().step(model, batch).loss_sum.item() == 0.0


def test_neighbours_do_not_change_a_samples_loss() -> None:
    model = build(CONFIGS["llama, tied head"], METHODS["lora"])
    first, *others = make_sequences()
    alone = OBJECTIVES["sft"].make().step(model, build_batch([first]))
    packed = build_batch([others[0], first, others[3]])
    logp = supervised_logp(model, packed)
    mine = -logp[packed.sample_N == first[0]].sum()
    torch.testing.assert_close(mine, alone.loss_sum, rtol=0, atol=1e-12)


# Shared prefixes


def from_lists(*items: tuple[list[int], tuple[tuple[int, int, float], ...]]) -> list[Any]:
    return [
        (sample, TokenSequence(np.array(ids, dtype=np.int32), runs))
        for sample, (ids, runs) in enumerate(items)
    ]


class ExactNorm(torch.nn.Module):
    """RMS norm in fp64; transformers' own works in fp32, which rounds a sum of gradients anew."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt()


def build_exact(config: Any, method: Any) -> Any:
    model = build(config, method)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(child))
    return model


RNG = np.random.default_rng(1)
PROMPT, QUESTION, ANSWER = (RNG.integers(1, 101, n).tolist() for n in (6, 5, 4))
FAMILIES = {
    "nothing shared": from_lists(([1, 2, 3, 4], ((1, 3, 1.0),)), ([2, 3, 4], ((2, 1, 1.0),))),
    # The row that ends the prompt predicts the first token of each answer.
    "equal prompts, answers from their first token on": from_lists(
        ([*PROMPT, *ANSWER], ((6, 4, 1.0),)),
        ([*PROMPT, 7, 8], ((6, 2, 0.5),)),
        ([*PROMPT, 9], ((6, 1, 1.0),)),
    ),
    "equal sequences": from_lists(*[([*PROMPT, *ANSWER], ((6, 4, 1.0),))] * 3),
    "supervised prefixes": from_lists(
        ([*PROMPT, 3, 4], ((0, 8, 1.0),)),
        ([*PROMPT, 5], ((2, 3, 0.25), (6, 1, 1.0))),
        ([*PROMPT, 6, 6, 6], ()),
    ),
    "two levels": from_lists(
        ([*PROMPT, *QUESTION, *ANSWER], ((11, 4, 1.0),)),
        ([*PROMPT, *QUESTION, 5, 6], ((10, 3, 1.0),)),
        ([*PROMPT, 100, 99], ((7, 1, 1.0),)),
        ([50, 51], ((1, 1, 1.0),)),
        ([*PROMPT], ((3, 3, 1.0),)),
    ),
}


@pytest.mark.parametrize("multiple_of", [1, 16])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("name", ["llama, tied head", "qwen3, normed q k"])
def test_shared_prefixes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, family: list[Any], multiple_of: int
) -> None:
    monkeypatch.setattr(prefixes, "SHORTEST_PREFIX", 3)
    model = build_exact(CONFIGS[name], METHODS["full"])
    tensors = [parameter for _, parameter in trainable_parameters(model)]
    forest = prefixes.shared_prefixes([sequence.ids for _, sequence in family])
    plain = build_batch(family)
    shared = build_batch(family, forest, multiple_of=multiple_of)

    is_shared = family is not FAMILIES["nothing shared"]
    assert bool(shared.segments.parents) == is_shared
    assert shared.num_tokens == plain.num_tokens
    assert shared.num_stored_tokens % multiple_of == 0
    assert not is_shared or multiple_of > 1 or shared.num_stored_tokens < plain.num_stored_tokens
    weights = [
        sorted(zip(b.sample_N.tolist(), b.target_N.tolist(), b.weight_N.tolist(), strict=True))
        for b in (plain, shared)
    ]
    assert weights[0] == weights[1]

    losses = [OBJECTIVES["sft"].make().step(model, batch).loss_sum for batch in (plain, shared)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    expected, found = (torch.autograd.grad(loss, tensors) for loss in losses)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_each_sample_keeps_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "SHORTEST_PREFIX", 3)
    model = build_exact(CONFIGS["llama, tied head"], METHODS["lora"])
    family = FAMILIES["two levels"]
    shared = build_batch(family, prefixes.shared_prefixes([s.ids for _, s in family]))
    logp = supervised_logp(model, shared)
    for item in family:
        alone = OBJECTIVES["sft"].make().step(model, build_batch([item])).loss_sum
        mine = shared.sample_N == item[0]
        total = -(shared.weight_N[mine].double() * logp[mine]).sum()
        torch.testing.assert_close(total, alone, rtol=0, atol=1e-9)
