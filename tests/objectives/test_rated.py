"""KTO on rated answers: exact at the start, equal to separate forwards, the same for any split."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from tunesmith.config.objective import RatedConfig
from tunesmith.data.loader import Loader
from tunesmith.data.pack import build_batch, mismatched
from tunesmith.data.tokenize import TokenSequence
from tunesmith.engine.step import Run, evaluate_loss, update
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.rated import RatedObjective
from tunesmith.types import PackedBatch

KINDS = ("kto", "apo_zero_unpaired")


def write_rated(folder: Path, count: int = 40) -> Path:
    """Answers rated by their politeness, 2 good to 1 bad, behind long prompts that differ."""
    rows = [
        {
            "prompt": f"{n % 9} is the number of a question that is worth sharing",
            "completion": f"no {n * 7}" + "?" * (n % 3) if n % 3 == 0 else f"please {n}",
            "label": n % 3 != 0,
        }
        for n in range(count)
    ]
    path = folder / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_a_system_prompt(path: Path) -> Path:
    """The same rows behind a system prompt that all of them share, with an earlier turn."""
    shared = [
        {"role": "system", "content": "Answer the questions of guests as a polite host does."},
        {"role": "user", "content": "Is the house open?"},
        {"role": "assistant", "content": "Please come in!"},
    ]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        {
            "messages": [
                *shared,
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            "label": row["label"],
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def rated(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe on rated answers."""

    def make(objective: object = "kto", **changes: Any) -> Path:
        data = {"train": str(write_rated(tmp_path)), "validation": 0.2}
        plain: dict[str, Any] = {"method": {"dropout": 0.0}, "data": data, "objective": objective}
        return tiny_recipe(**{**plain, **changes})

    return make


@contextmanager
def rated_run(recipe: Path, *overrides: str, noise: float = 0.0) -> Generator[Run]:
    """A run; noise takes the policy away from the reference."""
    with make_run(recipe, *overrides) as run:
        if noise:
            torch.manual_seed(3)
            with torch.no_grad():
                for _, parameter in run.parameters:
                    parameter.copy_(noise * torch.randn(parameter.shape, dtype=parameter.dtype))
        yield run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_loss_is_half_the_mean_weight(
    rated: Callable[..., Path], kind: str, method: str
) -> None:
    """Policy and reference are the same model: every answer costs half of its weight."""
    objective = {"name": kind, "desirable_weight": 0.5, "undesirable_weight": 1.5}
    with rated_run(rated(objective), f"method={method}") as run:
        batch = run.loader.batch(0)
        num_good = sum(run.loader.store.label(sample) for sample in batch.sample_ids)
        found = update(run, batch, 0)
    assert found is not None
    assert 0 < num_good < 8
    assert found[0].item() == pytest.approx(0.5 * (0.5 * num_good + 1.5 * (8 - num_good)) / 8)
    assert found[3:].count_nonzero() == 0  # no answer is told apart, and there is no KL


def separate_logp(run: Run, sequence: TokenSequence) -> torch.Tensor:
    """Summed log-probability of an answer, by a plain forward of its sequence alone."""
    alone, base = build_batch([(0, sequence)]), run.model.get_base_model()
    hidden = base.get_decoder()(input_ids=alone.ids_T[None], segments=alone.segments)
    logits = base.get_output_embeddings()(hidden.last_hidden_state[0, alone.row_N])
    return logits.log_softmax(-1).gather(1, alone.target_N[:, None]).sum()


def separate_loss(run: Run, sample_ids: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """KTO's loss by the paper's words, summed, and its reference point."""
    store = run.loader.store
    own = [store.sequence(store.sequences_of(sample)[0]) for sample in sample_ids]
    ratios: list[torch.Tensor] = []
    point = 0.0
    for sequence, other in zip(own, own[1:] + own[:1], strict=True):
        start, first = sequence.runs[0][0], other.runs[0][0]
        ids = np.concatenate([sequence.ids[:start], other.ids[first:]])
        foreign = TokenSequence(ids, ((start, len(ids) - start, 1.0),))
        with torch.no_grad():
            mean = separate_logp(run, foreign)
            with run.model.disable_adapter():
                mean = mean - separate_logp(run, foreign)
                reference = separate_logp(run, sequence)
        point += mean.item() / len(own)
        ratios.append(separate_logp(run, sequence) - reference)
    point = max(0.0, point)
    losses = [
        1 - torch.sigmoid((1 if store.label(sample) else -1) * 0.1 * (ratio - point))
        for sample, ratio in zip(sample_ids, ratios, strict=True)
    ]
    return torch.stack(losses).sum(), point


def test_a_pack_equals_separate_forwards(rated: Callable[..., Path]) -> None:
    """Loss, reference point and gradients in fp64, against one forward for each answer."""
    with rated_run(rated(), "train.micro_batch_tokens=4000", noise=0.1) as run:
        run.model.double().train()
        (batch,) = run.loader.batch(0).micro_batches
        assert batch.group_GK.shape == (8, 2)
        assert batch.num_stored_tokens < 0.8 * batch.num_tokens  # prompts are shared
        result = run.objective.step(run.model, batch)
        parameters = [parameter for _, parameter in run.parameters]
        found = torch.autograd.grad(result.loss_sum, parameters)
        loss, point = separate_loss(run, run.loader.batch(0).sample_ids)
        expected = torch.autograd.grad(loss, parameters)
    assert point > 0.01
    assert result.metrics["kl"].item() == pytest.approx(8 * point, rel=1e-7)
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=1e-9)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_samples_share_their_beginning(rated: Callable[..., Path], tmp_path: Path) -> None:
    """A system prompt of all answers is computed once; results are those of separate forwards."""
    path = with_a_system_prompt(write_rated(tmp_path))
    recipe = rated(data={"train": str(path), "validation": 0})
    with rated_run(recipe, "train.micro_batch_tokens=6000", noise=0.1) as run:
        run.model.double().train()
        (batch,) = run.loader.batch(0).micro_batches
        assert batch.group_GK.shape == (8, 2)
        assert batch.num_stored_tokens < 0.4 * batch.num_tokens
        result = run.objective.step(run.model, batch)
        parameters = [parameter for _, parameter in run.parameters]
        found = torch.autograd.grad(result.loss_sum, parameters)
        loss, point = separate_loss(run, run.loader.batch(0).sample_ids)
        expected = torch.autograd.grad(loss, parameters)
    assert result.metrics["kl"].item() == pytest.approx(8 * point, rel=1e-7)
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("train_on", ["all", "last", [1]])
def test_the_last_answer_alone_was_rated(
    rated: Callable[..., Path], tmp_path: Path, train_on: Any
) -> None:
    """Earlier turns are part of the prompt, whatever `data.train_on` says."""
    path = with_a_system_prompt(write_rated(tmp_path, 9))
    lines = path.read_text().splitlines()
    data = {"train": str(path), "validation": 0, "train_on": train_on}
    with rated_run(rated(data=data)) as run:
        store = run.loader.store
        for sample in range(9):
            (index,) = store.sequences_of(sample)
            sequence = store.sequence(index)
            ((_, count, weight),) = sequence.runs
            assert weight == 1.0
            row = json.loads(lines[store.origin(sample).line - 1])
            assert count == len(row["messages"][-1]["content"]) + 1  # bytes, and the end mark


def test_kto_has_some_answers_to_estimate_from(rated: Callable[..., Path]) -> None:
    """0.2 % of a small file would be one answer; its relative needs no estimate."""
    for kind, batch in (("kto", 8), ("apo_zero_unpaired", 1)):
        with rated_run(rated(kind), "train.global_batch=auto") as run:
            assert run.recipe.train.global_batch == batch


def updated(run: Run, tokens: int, *, look_ahead: bool) -> list[float]:
    """Loss, norm and metrics of the first step in micro-batches of so many tokens."""
    batch = replace(run.loader, micro_batch_tokens=tokens).batch(0)
    assert (len(batch.micro_batches) > 1) == (tokens < 1000)
    objective: Any = run.objective
    if look_ahead:
        run.model.train()
        found = [objective.look_ahead(run.model, micro) for micro in batch.micro_batches]
        objective = objective.prepared(found)
    # Not to be learned from: the next call begins with the same weights.
    numbers = update(replace(run, objective=objective), batch, 0, highest_loss=-1.0)
    assert numbers is not None
    return numbers.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_is_the_same(rated: Callable[..., Path], kind: str) -> None:
    """KTO's reference point is looked up in all micro-batches first; its relative has none."""
    is_kto = kind == "kto"
    with rated_run(rated(kind), noise=0.1) as run:
        assert isinstance(run.objective, RatedObjective)
        assert run.objective.looks_ahead == is_kto
        whole = updated(run, 10_000, look_ahead=False)
        assert updated(run, 150, look_ahead=is_kto) == pytest.approx(whole, rel=1e-5)
        if is_kto:
            assert updated(run, 10_000, look_ahead=True) == pytest.approx(whole, rel=1e-5)


def test_micro_batches_by_themselves_are_near(rated: Callable[..., Path]) -> None:
    """With a point of their own each, their losses are near those of the step, not the same."""
    with rated_run(rated(), noise=0.1) as run, torch.no_grad():
        losses = [
            sum(run.objective.step(run.model, micro).loss_sum.item() for micro in parts)
            for tokens in (150, 10_000)
            for parts in (replace(run.loader, micro_batch_tokens=tokens).batch(0).micro_batches,)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def answers_of(batch: PackedBatch) -> dict[tuple[int, int], list[int]]:
    """The supervised tokens by (sample, place in its group)."""
    found: dict[tuple[int, int], list[int]] = {}
    for sequence, sample, target in zip(
        batch.sequence_N.tolist(), batch.sample_N.tolist(), batch.target_N.tolist(), strict=True
    ):
        place = int((batch.group_GK == sequence).nonzero()[0, 1])
        found.setdefault((sample, place), []).append(target)
    return found


def mismatched_answers(loader: Loader, step: int = 0) -> dict[tuple[int, int], list[int]]:
    return {
        k: v for micro in loader.batch(step).micro_batches for k, v in answers_of(micro).items()
    }


def test_mismatched_answers_depend_on_the_step_alone(rated: Callable[..., Path]) -> None:
    """Each is the next sample's answer, whatever the budget; one sample alone has one, too."""
    with rated_run(rated()) as run:
        loader = run.loader
        found = mismatched_answers(loader)
        samples = loader.batch(0).sample_ids
        for sample, following in zip(samples, samples[1:] + samples[:1], strict=True):
            assert found[sample, 1] == found[following, 0]
        for tokens in (1, 200, 10_000):
            assert mismatched_answers(replace(loader, micro_batch_tokens=tokens)) == found
        single = mismatched_answers(replace(loader, global_batch=1))
        (sample,) = replace(loader, global_batch=1).batch(0).sample_ids
        assert single[sample, 0] == found[sample, 0] != single[sample, 1]
        lonely = replace(loader, samples=loader.samples[:1], shares=(), global_batch=1)
        own = mismatched_answers(lonely)
        assert own[int(loader.samples[0]), 0] == own[int(loader.samples[0]), 1]
        rest = frozenset(samples[1:])
        left = mismatched_answers(replace(loader, excluded=rest))
        assert {key for key, _ in left} == {samples[0]}
        assert left[samples[0], 1] not in [found[other, 0] for other in rest]


def test_a_mismatched_answer_keeps_to_the_length() -> None:
    ids = torch.arange(20, dtype=torch.int32).numpy()
    short = TokenSequence(ids[:6], ((4, 2, 1.0),))
    several = TokenSequence(ids, ((2, 3, 1.0), (10, 10, 1.0)))
    found = mismatched(short, several, 9)
    assert found.ids.tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 14]
    assert found.runs == ((4, 5, 1.0),)
    assert mismatched(several, short, 99).ids.tolist() == [*range(10), 4, 5]


def test_without_a_reference_the_point_is_the_mean_log_probability() -> None:
    """No bound at 0: every log-probability is below."""
    objective = RatedObjective("kto")
    point = objective.prepared([torch.tensor([-2.0]), torch.tensor([-5.0, -8.0])]).point
    assert point is not None
    assert point.item() == -5.0
    with pytest.raises(ValidationError, match="with kto"):
        RatedConfig(name="apo_zero_unpaired", reference=False)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*KINDS, {"name": "kto", "reference": False}])
def test_held_out_answers_are_told_apart(rated: Callable[..., Path], objective: Any) -> None:
    """After some steps the sign of the reward is that of the rating, on rows not trained on."""
    with rated_run(rated(objective), "train.epochs=8") as run:
        assert run.validation is not None
        before = evaluate_loss(run, run.validation.all_batches())
        for step in range(run.num_steps):
            update(run, run.loader.batch(step), step)
        after = evaluate_loss(run, run.validation.all_batches())
    assert before is not None
    assert after is not None
    assert after[0] < before[0] - 0.02
    assert after[2] > before[2]  # reward_gap
    if objective in KINDS:
        assert before[0] == pytest.approx(0.5)
        assert after[1] > 0.9  # reward_accuracy


@pytest.mark.parametrize(
    "kind",
    [pytest.param("kto", marks=pytest.mark.slow), pytest.param(KINDS[1], marks=pytest.mark.slow)],
)
def test_rated_answers_resume_exactly(
    rated: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    recipe = rated(kind)
    run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "stopped", 7)
    run_to_end(recipe, tmp_path / "stopped")
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "whole")
    lines = (tmp_path / "whole" / "events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    assert ("kl" in steps[-1]) == (kind == "kto")
    assert {"reward_accuracy", "reward_gap"} < set(steps[-1])


def test_rated_names_are_the_registrys() -> None:
    for kind in KINDS:
        assert OBJECTIVES[kind].kinds == ("Rated",)
        assert RatedConfig.model_validate({"name": kind}).beta == 0.1


def test_the_loop_looks_ahead(rated: Callable[..., Path]) -> None:
    """A step of several micro-batches is that of one, without a word to it."""
    with rated_run(rated(), noise=0.1) as run:
        whole = updated(run, 10_000, look_ahead=False)
        assert updated(run, 150, look_ahead=False) == pytest.approx(whole, rel=1e-5)
