"""Rewards and labels on packs: against independent losses, one by one, and learning."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from conftest import TINY_SIZES
from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from objectives.test_packed_equals_unpacked import ExactNorm
from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.data.pack import build_batch, pack_groups
from tunesmith.data.tokenize import TokenSequence
from tunesmith.engine.events import read_events
from tunesmith.engine.step import evaluate_loss
from tunesmith.model.adapters import attach, trainable_parameters
from tunesmith.model.heads import Head
from tunesmith.model.load import random_model
from tunesmith.objectives.classify import ClassifyObjective
from tunesmith.objectives.reward import RewardObjective
from tunesmith.ops.measures import macro_f1
from tunesmith.types import PackedBatch

SIZES: dict[str, Any] = {**TINY_SIZES, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
EACH = [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
METHODS = {
    "full": FullConfig(name="full"),
    "lora": LoraConfig(name="lora", rank=4, alpha=8.0),
}
LABELS = ("a", "b", "c")


def model_of(config: str, method: str, head: Head) -> Any:
    torch.manual_seed(0)
    base = random_model(copy.deepcopy(CONFIGS[config]), is_bf16=False, head=head)
    model = attach(base, METHODS[method]).double()
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            if ".lora_B." in name or "score" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(child))
    return model.train()


def sequences_of(*lengths: int, shared: int = 0) -> list[TokenSequence]:
    """Sequences of random tokens, whose first so many are the same."""
    rng = np.random.default_rng(1)
    start = rng.integers(1, 101, shared)
    return [
        TokenSequence(
            np.concatenate([start, rng.integers(1, 101, length)]).astype(np.int32),
            ((shared, length, 1.0),),
        )
        for length in lengths
    ]


def plain_scores(model: Any, sequences: list[TokenSequence]) -> torch.Tensor:
    """Scores of transformers' own head, one plain forward for each sequence."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[torch.Tensor] = []
    for sequence in sequences:
        alone = build_batch([(0, sequence)])
        decoder = base.get_decoder()
        out = decoder(input_ids=alone.ids_T[None], use_cache=False, segments=alone.segments)
        found.append(base.score(out.last_hidden_state)[0, -1])
    return torch.stack(found)


def gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Of all that is trained; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return list(found)


def pairs() -> tuple[list[TokenSequence], PackedBatch]:
    """Three pairs, two of which share a prompt, in one pack."""
    groups = [sequences_of(5, 3, shared=40), sequences_of(2, 7, shared=50), sequences_of(4, 6)]
    own = [(number, each) for number, group in enumerate(groups) for each in group]
    ((*forest,),) = pack_groups([[s.ids for s in g] for g in groups], 1000, share_prefixes=True)
    batch = build_batch(own, forest, multiple_of=8, group_size=2)
    assert batch.segments.parents
    return [each for _, each in own], batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", EACH)
def test_packed_rewards_equal_one_by_one(config: str, method: str) -> None:
    """Loss and every gradient in fp64, with centering and a margin."""
    model, (sequences, batch) = model_of(config, method, Head()), pairs()
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    result = RewardObjective(center=0.05, margin=0.3).step(model, batch)
    found = gradients(result.loss_sum, parameters)
    score_P2 = plain_scores(model, sequences).view(-1, 2)
    delta_P = score_P2[:, 0] - score_P2[:, 1]
    loss = torch.log1p(torch.exp(0.3 - delta_P)).sum() + 0.05 * score_P2.sum(1).square().sum()
    expected = gradients(loss, parameters)
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=1e-9)
    assert sum(bool(each.any()) for each in found) > 3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    values = {name: float(value) for name, value in result.metrics.items()}
    assert values == {
        "accuracy": float((delta_P > 0).sum()),
        "margin": pytest.approx(delta_P.sum().item()),
        "chosen_score": pytest.approx(score_P2[:, 0].sum().item()),
        "rejected_score": pytest.approx(score_P2[:, 1].sum().item()),
    }
    with torch.no_grad():
        measured = RewardObjective(center=0.05, margin=0.3).step(model.eval(), batch)
    plain = torch.log1p(torch.exp(-delta_P)).sum()
    assert measured.loss_sum.item() == pytest.approx(plain.item(), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", EACH)
def test_packed_labels_equal_one_by_one(config: str, method: str) -> None:
    model = model_of(config, method, Head(LABELS))
    sequences = sequences_of(4, 1, 9, 3)
    classes = {0: 2, 1: 0, 2: 2, 3: 1}
    batch = build_batch(list(enumerate(sequences)), multiple_of=8, classes=classes)
    assert batch.loss_weight == 4
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    result = ClassifyObjective(LABELS).step(model, batch)
    found = gradients(result.loss_sum, parameters)
    logits_SC = plain_scores(model, sequences)
    loss = cross_entropy(logits_SC, torch.tensor([2, 0, 2, 1]), reduction="sum")
    expected = gradients(loss, parameters)
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=1e-9)
    assert sum(bool(each.any()) for each in found) > 3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_figures_of_labels() -> None:
    """Against counting by hand: two micro-batches' sums, one label that is never found."""
    objective = ClassifyObjective(LABELS)
    # there: a a a b c; found: a a b b a
    sums = [3.0, 2.0, 1.0, 0.0, 3.0, 2.0, 0.0, 3.0, 1.0, 1.0]
    found = objective.summarized([each / 5 for each in sums])
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert macro_f1([1, 0], [1, 0], [1, 0]) == 1.0
    assert macro_f1([], [], []) == 0.0


# Runs


def write_pairs(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"A question that is long enough to be worth sharing, number {n % 9}",
            "chosen": f"please {n}" + "!" * (n % 4),
            "rejected": f"no {n * 7}" + "?" * (n % 3),
        }
        for n in range(40)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_labeled(folder: Path) -> Path:
    words = ("red", "green", "blue")
    rows = [{"text": f"thing {n} is {words[n % 3]}", "label": words[n % 3]} for n in range(45)]
    path = folder / "labeled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe of either objective on small data."""

    def make(name: str, **changes: Any) -> Path:
        file = write_pairs(tmp_path) if name == "reward" else write_labeled(tmp_path)
        plain: dict[str, Any] = {
            "data": {"train": str(file), "validation": 0.2},
            "method": {"dropout": 0.0},
            "objective": name,
        }
        return tiny_recipe(**{**plain, **changes})

    return make


def test_the_first_loss_of_a_reward_model_is_near_ln_2(recipe_of: Callable[..., Path]) -> None:
    with make_run(recipe_of("reward")) as run:
        score = run.model.get_base_model().score
        assert 0.5 / 33 < float(score.weight.detach().std()) < 2 / 33
        loss, *_ = evaluate_loss(run, run.loader.batch(0).micro_batches) or [math.nan]
    assert loss == pytest.approx(math.log(2), abs=0.1)


def test_any_budget_is_the_same(recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    """Validation's figures are those of all rows at once, however they are cut."""
    found: list[list[float]] = []
    for budget in (30, 4000):
        changes = (f"train.micro_batch_tokens={budget}", f"output={tmp_path / str(budget)}")
        with make_run(recipe_of("classify"), *changes) as run:
            assert run.validation is not None
            found.append(evaluate_loss(run, run.validation.all_batches()) or [])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    there = found[0][-3:]
    assert there == pytest.approx([1 / 3] * 3)  # three labels, stratified


@pytest.mark.slow
def test_the_same_seed_draws_the_same_head(recipe_of: Callable[..., Path], tmp_path: Path) -> None:
    drawn: list[torch.Tensor] = []
    for place, seed in enumerate((0, 0, 1)):
        changes = (f"train.seed={seed}", f"output={tmp_path / str(place)}")
        with make_run(recipe_of("reward"), *changes) as run:
            drawn.append(run.model.get_base_model().score.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param("reward", "lora", marks=pytest.mark.slow),
        pytest.param("classify", "freeze", marks=pytest.mark.slow),
        pytest.param("classify", "lora", marks=pytest.mark.slow),
        pytest.param("reward", "full", marks=pytest.mark.slow),
        pytest.param("reward", "freeze", marks=pytest.mark.slow),
        pytest.param("classify", "pissa", marks=pytest.mark.slow),
        pytest.param("reward", "ia3", marks=pytest.mark.slow),
        pytest.param("classify", "prompt_tuning", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(
    recipe_of: Callable[..., Path], tmp_path: Path, name: str, method: str
) -> None:
    recipe = recipe_of(name, train={"epochs": 2})
    tree = {**json.loads(recipe.read_text()), "method": method}
    recipe.write_text(json.dumps(tree))
    summary = run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "parts", 3)
    run_to_end(recipe, tmp_path / "parts")
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    assert summary["eval_loss"] < summary["eval_loss_before"]
    (*_, last) = [
        event
        for event in read_events(tmp_path / "whole" / "events.jsonl")
        if event["event"] == "evaluation"
    ]
    assert last["accuracy"] >= (1.0 if name == "reward" and method == "lora" else 0.3)
    assert ("macro_f1" in last) == (name == "classify")


@pytest.mark.slow
def test_a_real_reward_model_tells_held_out_pairs_apart(tmp_path: Path) -> None:
    """SmolLM2-135M on the pairs of the example: other questions, other phrases."""
    example = Path(__file__).resolve().parents[2] / "examples" / "reward-model.yaml"
    run_to_end(example, tmp_path / "run")
    evaluations = [
        event
        for event in read_events(tmp_path / "run" / "events.jsonl")
        if event["event"] == "evaluation"
    ]
    best = min(evaluations[1:], key=lambda event: event["loss"])
    assert best["accuracy"] > 0.9
