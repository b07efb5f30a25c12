"""GRPO and PPO as runs: batches as they should be, learning, and exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from tunesmith.data.pack import build_batch
from tunesmith.data.tokenize import TokenSequence
from tunesmith.engine.events import read_events
from tunesmith.engine.step import Run, update
from tunesmith.objectives.policy import PolicyObjective
from tunesmith.objectives.policy_losses import PolicyForm, policy_terms
from tunesmith.rollout.experience import Experience
from tunesmith.rollout.rollouts import Rollouts
from tunesmith.types import GlobalBatch

LETTERS = {"kind": "regex", "pattern": "[a-m]"}
MORE_STOPS = [("grpo", 4), ("rloo", 3), ("ppo", 6)]
NAMES = ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "ppo"]


@pytest.fixture
def policy(tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """A recipe that samples answers of the tiny model, rewarded for a letter of a to m."""

    def make(name: str = "grpo", **changes: Any) -> Path:
        objective = {"name": name, "max_new_tokens": 8, "rewards": [LETTERS]}
        if name != "ppo":
            objective["answers"] = 4
        objective.update(changes.pop("objective", {}))
        plain: dict[str, Any] = {
            "method": {"dropout": 0.0},
            "objective": objective,
            "train": {"epochs": 1, "global_batch": 6, "micro_batch_tokens": 400},
        }
        return tiny_recipe(**{**plain, **changes})

    return make


def sampled(run: Run, step: int = 0) -> tuple[GlobalBatch, Experience]:
    rollouts = run.rollouts
    assert isinstance(rollouts, Rollouts)
    budget = run.loader.micro_batch_tokens
    batch = rollouts.batch(run.loader.batch(step), step, budget, lambda: False)
    assert batch is not None
    assert rollouts.current is not None
    return batch, rollouts.current


def separate(run: Run, experience: Experience) -> list[torch.Tensor]:
    """Log-probabilities of each answer's tokens, one plain forward for each answer."""
    base: Any = run.model.get_base_model()
    found: list[torch.Tensor] = []
    for number, answer in enumerate(experience.answers):
        prompt = experience.prompts[number // experience.num_answers]
        ids = np.array([*prompt, *answer], dtype=np.int32)
        alone = build_batch([(0, TokenSequence(ids, ((len(prompt), len(answer), 1.0),)))])
        out = base.get_decoder()(input_ids=alone.ids_T[None], segments=alone.segments)
        logits_NV = base.get_output_embeddings()(out.last_hidden_state[0][alone.row_N])
        logp_NV = (logits_NV / temperature_of(run)).log_softmax(-1)
        found.append(logp_NV.gather(1, alone.target_N[:, None])[:, 0])
    return found


def temperature_of(run: Run) -> float:
    assert isinstance(run.objective, PolicyObjective)
    return run.objective.temperature


def expected_loss(name: str, run: Run, experience: Experience) -> torch.Tensor:
    """From the papers' equations, an answer at a time, on policy."""
    logp = separate(run, experience)
    with torch.no_grad(), run.model.disable_adapter():
        reference = separate(run, experience)
    reward_PK = experience.reward_PK
    losses: list[torch.Tensor] = []
    for number, own in enumerate(logp):
        group = reward_PK[number // experience.num_answers]
        reward = experience.reward_A[number]
        if name == "rloo":
            with torch.no_grad():
                divergences = [(a - b).sum() for a, b in zip(logp, reference, strict=True)]
            first = number // experience.num_answers * experience.num_answers
            each = torch.stack(divergences[first : first + experience.num_answers])
            shaped = group - 0.05 * each
            mine = shaped[number - first]
            advantage = mine - (shaped.sum() - mine) / (len(group) - 1)
            losses.append(-((own - own.detach()).sum().exp() * advantage))
            continue
        centered = reward - group.mean()
        advantage = centered if name == "dr_grpo" else centered / (group.std() + 1e-4)
        ratio_T = (own - own.detach()).exp()
        if name == "gspo":
            ratio_T = (own - own.detach()).mean().exp().expand(len(own))
        loss_T = -ratio_T * advantage
        if name == "grpo":
            difference_T = reference[number] - own
            loss_T = loss_T + 0.04 * (difference_T.exp() - difference_T - 1)
        losses.append({"dapo": loss_T.sum(), "dr_grpo": loss_T.sum() / 8}.get(name, loss_T.mean()))
    divisor = len(losses)
    if name == "dapo":
        differs = [bool(group.max() > group.min()) for group in reward_PK]
        each = experience.num_answers
        kept = [n for n in range(len(losses)) if differs[n // each]]
        losses = [losses[n] for n in kept]
        divisor = sum(len(experience.answers[n]) for n in kept)
    return torch.stack(losses).sum() / divisor


@pytest.mark.parametrize("name", NAMES[:-1])
def test_packs_equal_separate_forwards(policy: Callable[..., Path], name: str) -> None:
    """Loss and gradients in fp64, with answers behind one copy of their prompt, on policy."""
    recipe = policy(name, objective={"temperature": 0.8})
    with make_run(recipe, "train.micro_batch_tokens=200") as run:
        run.model.double()
        parameters = [parameter for _, parameter in run.parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
        batch, experience = sampled(run)
        assert batch.num_stored_tokens < batch.num_tokens  # prompts are shared
        assert len(batch.micro_batches) > 1
        run.model.train()
        loss = torch.zeros((), dtype=torch.float64)
        for micro in batch.micro_batches:
            found = run.objective.step(run.model, micro)
            loss = loss + found.loss_sum / batch.supervised_weight
            assert found.metrics["ratio"] / micro.loss_weight == pytest.approx(1, rel=0.3)
        ours = torch.autograd.grad(loss, parameters)
        expected = expected_loss(name, run, experience)
        theirs = torch.autograd.grad(expected, parameters)
    tolerance = 1e-5 if name == "rloo" else 1e-6  # columns are float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=tolerance * scale)


def test_old_log_probabilities_are_those_before_the_updates(policy: Callable[..., Path]) -> None:
    """Ratios begin at 1, exactly on the same packs, and leave it; the sampling engine agrees."""
    with make_run(policy(objective={"updates": 3})) as run:
        batch, experience = sampled(run)
        old_T, engine_T = (experience.columns_T[n] for n in ("old_logp", "engine_logp"))
        torch.testing.assert_close(old_T, engine_T, rtol=0, atol=1e-5)
        ratios = []
        for step in range(3):
            again, same = sampled(run, step)
            assert same is experience
            found = update(run, again, step)
            assert found is not None
            names = ("loss", "norm", "is_good", *run.objective.metric_names)
            ratios.append(dict(zip(names, found.tolist(), strict=True))["ratio"])
        assert ratios[0] == pytest.approx(1.0, abs=1e-6)
        assert abs(ratios[2] - 1.0) > 1e-5
        following, new = sampled(run, 3)
        assert new.number == 1
        assert following.sample_ids != batch.sample_ids


def test_mini_batches_part_the_prompts(policy: Callable[..., Path]) -> None:
    objective = {"updates": 2, "mini_batches": 3, "drop_equal": False}
    with make_run(policy(objective=objective)) as run:
        parts = [sampled(run, step)[0].sample_ids for step in range(6)]
        _, experience = sampled(run, 5)
    every = set(experience.sample_ids)
    for first in (0, 3):
        chosen = [sample for part in parts[first : first + 3] for sample in part]
        assert len(chosen) == len(every) == 6
        assert set(chosen) == every
    assert parts[:3] != parts[3:]


@pytest.mark.parametrize(
    "name",
    [n if n == "grpo" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_rewards_rise(policy: Callable[..., Path], tmp_path: Path, name: str) -> None:
    train = {"epochs": 8, "global_batch": 8, "micro_batch_tokens": 2000, "learning_rate": 0.01}
    train["warmup"] = 0
    if name == "ppo":
        train["epochs"] = 4
    changes = {"clip": 0.05, "clip_high": 0.05} if name == "gspo" else {"kl_weight": 0.0}
    recipe = policy(name, train=train, objective=changes, method="full")
    summary = run_to_end(recipe, tmp_path / "out")
    steps = [e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "step"]
    rewards = [event["reward"] for event in steps]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.25, rewards
    assert summary["skipped_steps"] == 0
    learned = [event for event in steps if event["supervised_tokens"]]
    assert all(abs(event["engine_ratio"] - 1) < 0.2 for event in learned)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("ppo", 5),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_STOPS),
    ],
)
def test_a_resumed_run_is_bit_equal(
    policy: Callable[..., Path], tmp_path: Path, name: str, stop: int
) -> None:
    """Also in the middle of the updates on one set of answers, with a KL weight that adapts."""
    objective: dict[str, Any] = {"updates": 2, "mini_batches": 2}
    if name == "ppo":
        objective |= {"kl_target": 0.1, "kl_horizon": 20}
    recipe = policy(name, objective=objective, checkpoint={"every_steps": 100})
    run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "cut", step=stop)
    run_to_end(recipe, tmp_path / "cut")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")
    texts = [
        (tmp_path / name / "samples" / f"step-{stop // 4 * 4 + 1:08d}.jsonl").read_text()
        for name in ("whole", "cut")
    ]
    assert texts[0] == texts[1]


def test_what_was_sampled_can_be_read(policy: Callable[..., Path], tmp_path: Path) -> None:
    run_to_end(policy(train={"epochs": 1, "max_steps": 1}), tmp_path / "out")
    text = (tmp_path / "out" / "samples" / "step-00000001.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 16  # four prompts
    assert {row["reward"] for row in rows} <= {0.0, 1.0}
    assert all(row["prompt"].startswith("<|im_start|>user") for row in rows)
    assert all(row["reference"].startswith("answer ") for row in rows)
    assert (tmp_path / "out" / "samples" / "validation-00000000.jsonl").exists()
    measured = [
        e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "evaluation"
    ]
    assert measured[0]["loss"] == -measured[0]["reward"]


def test_an_experience_comes_back_from_its_file(
    policy: Callable[..., Path], tmp_path: Path
) -> None:
    with make_run(policy("rloo")) as run:
        _, experience = sampled(run)
    experience.save(tmp_path / "x" / "experience.safetensors")
    again = Experience.load(tmp_path / "x" / "experience.safetensors")
    for name in ("number", "sample_ids", "prompts", "answers", "kl_weight"):
        assert getattr(again, name) == getattr(experience, name)
    assert {**again.facts, "sampling_seconds": None} == {
        **experience.facts,
        "sampling_seconds": None,
    }
    for name, column_T in experience.columns_T.items():
        assert torch.equal(again.columns_T[name], column_T)
    assert torch.equal(again.reward_A, experience.reward_A)


def test_the_value_head_learns_returns(policy: Callable[..., Path]) -> None:
    with make_run(policy("ppo"), "train.learning_rate=0.05") as run:
        assert [name for name, _ in run.parameters][-2:] == ["value_head.weight", "value_head.bias"]
        losses = []
        for step in range(4):
            found = update(run, sampled(run, step)[0], step)
            assert found is not None
            losses.append(found.tolist()[-1])
    assert losses[-1] < losses[0]


def test_a_ratio_cap_and_engine_weights_change_the_loss(policy: Callable[..., Path]) -> None:
    form = PolicyForm(ratio_cap=3.0)
    logp_T, old_T = torch.tensor([0.0]), torch.tensor([-2.0])
    terms = policy_terms(logp_T, old_T, torch.tensor([-1.0]), form=form)
    assert terms.loss_T.tolist() == [3.0]
    with make_run(policy(objective={"engine_weight_cap": 2.0})) as run:
        batch, _ = sampled(run)
        micro = batch.micro_batches[0]
        columns = dict(micro.columns_N)
        columns["engine_logp"] = columns["engine_logp"] + 0.5
        plain = run.objective.step(run.model, micro).loss_sum
        columns["advantage"] = torch.ones_like(columns["advantage"])
        from dataclasses import replace

        weighed = run.objective.step(run.model, replace(micro, columns_N=columns)).loss_sum
    assert plain.isfinite()
    expected = -float(micro.weight_N.sum()) * float(torch.tensor(-0.5).exp())
    assert weighed.item() == pytest.approx(expected, rel=1e-4)
