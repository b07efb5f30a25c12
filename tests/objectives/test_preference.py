"""DPO and its relatives on packed pairs: exact at the start, as separate forwards, learning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from tunesmith.data.pack import pack_groups
from tunesmith.data.prefixes import Branch
from tunesmith.engine.step import Run, evaluate_loss, update
from tunesmith.errors import DataError
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.preference import PreferenceObjective
from tunesmith.objectives.preference_losses import PAIR_KINDS, pair_terms
from tunesmith.types import PackedBatch

PAIR_NAMES = sorted(
    name
    for name, family in OBJECTIVES.items()
    if getattr(family.make, "func", None) is PreferenceObjective
)


def write_pairs(folder: Path, count: int = 40) -> Path:
    """Pairs with a long common prompt; the chosen answer is polite."""
    rows = [
        {
            "prompt": f"A question that is long enough to be worth sharing, number {n % 9}",
            "chosen": f"please {n}" + "!" * (n % 4),
            "rejected": f"no {n * 7}" + "?" * (n % 3),
        }
        for n in range(count)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe on pairs."""

    def make(objective: object = "dpo", **changes: Any) -> Path:
        data = {"train": str(write_pairs(tmp_path)), "validation": 0.2}
        plain: dict[str, Any] = {"method": {"dropout": 0.0}, "data": data, "objective": objective}
        return tiny_recipe(**{**plain, **changes})

    return make


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_the_first_loss_is_ln_2_and_the_margin_0(pairs: Callable[..., Path], method: str) -> None:
    """Exactly: policy and reference are the same model on the same pack."""
    with make_run(pairs(), f"method={method}") as run:
        found = update(run, run.loader.batch(0), 0)
        assert found is not None
        loss, _, is_good, accuracy, margin, *_ = found.tolist()
    assert is_good
    assert loss == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-7)
    assert (accuracy, margin) == (0.0, 0.0)


def separate_logp(run: Run, batch: PackedBatch) -> torch.Tensor:
    """Summed log-probability of each sequence, one plain forward for each."""
    from tunesmith.data.pack import build_batch

    store, found = run.loader.store, []
    group = batch.group_GK
    samples = list(dict.fromkeys(batch.sample_N.tolist()))
    by_group: dict[int, int] = {}
    for row in range(len(batch.row_N)):
        place = int((group == int(batch.sequence_N[row])).nonzero()[0, 0])
        by_group[place] = int(batch.sample_N[row])
    assert sorted(by_group.values()) == sorted(samples)
    for place in range(len(group)):
        for index in store.sequences_of(by_group[place]):
            alone = build_batch([(0, store.sequence(index))])
            hidden = (
                run.model.get_base_model()
                .get_decoder()(input_ids=alone.ids_T[None], segments=alone.segments)
                .last_hidden_state[0]
            )
            logits = run.model.get_base_model().get_output_embeddings()(hidden[alone.row_N])
            logp = logits.log_softmax(-1).gather(1, alone.target_N[:, None])
            found.append(logp.sum())
    return torch.stack(found).view(-1, 2)


def sequences_of(run: Run, samples: tuple[int, ...]) -> list[list[Any]]:
    """The token ids of each sample's sequences."""
    store = run.loader.store
    return [[store.sequence(i).ids for i in store.sequences_of(sample)] for sample in samples]


def stored(forest: list[Branch]) -> int:
    """Tokens that are computed."""
    return sum(branch.num_stored for branch in forest)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_shared_prompts_equal_separate_forwards(pairs: Callable[..., Path], kind: str) -> None:
    """Losses and gradients in fp64 of a pack, against one forward for each answer."""
    with make_run(pairs(kind), "train.micro_batch_tokens=4000") as run:
        run.model.double()
        parameters = [p for _, p in run.parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
        (batch,) = run.loader.batch(0).micro_batches
        # Prompts are shared within pairs and, but for their ends, between them.
        own = pack_groups(sequences_of(run, run.loader.batch(0).sample_ids), 1, share_prefixes=True)
        assert len(own) == 8
        assert batch.num_stored_tokens < 0.7 * sum(stored(forest) for forest in own)
        assert max(len(batch.segments.ancestors(n)) for n in range(len(batch.segments.lengths))) > 1
        run.model.train()
        result = run.objective.step(run.model, batch)
        found = torch.autograd.grad(result.loss_sum, parameters)
        logp_P2 = separate_logp(run, batch)
        given: dict[str, torch.Tensor] = {}
        if OBJECTIVES[kind].needs_reference:
            with torch.no_grad(), run.model.disable_adapter():
                ref_P2 = separate_logp(run, batch)
            given = {"chosen_ref_P": ref_P2[:, 0], "rejected_ref_P": ref_P2[:, 1]}
        counts = torch.bincount(batch.sequence_N)[batch.group_GK].double()
        objective: Any = run.objective
        terms = pair_terms(
            objective.kind, logp_P2[:, 0], logp_P2[:, 1], **given,
            chosen_tokens_P=counts[:, 0], rejected_tokens_P=counts[:, 1],
            beta=objective.beta, margin=objective.margin, sft_weight=objective.sft_weight,
        )  # fmt: skip
        expected = torch.autograd.grad(terms.loss_P.sum(), parameters)
    assert result.loss_sum.item() == pytest.approx(terms.loss_P.sum().item(), rel=1e-9)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_pair_stays_together_whatever_the_budget(pairs: Callable[..., Path]) -> None:
    """Both answers of a pair are in one micro-batch, also where it is larger than the budget."""
    with make_run(pairs(), "train.micro_batch_tokens=30") as run:
        batch = run.loader.batch(0)
        assert len(batch.micro_batches) > 1
        assert batch.supervised_weight == len(batch.sample_ids) == 8
        for micro in batch.micro_batches:
            assert micro.group_GK.shape[1] == 2
            assert len(micro.sample_N.unique()) == len(micro.group_GK) == micro.loss_weight
        whole = replace(run.loader, micro_batch_tokens=10_000).batch(0)
        found = update(run, batch, 0, highest_loss=-math.inf)
        expected = update(run, whole, 0, highest_loss=-math.inf)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "hinge", "ipo", "simpo", "orpo", "robust"])
def test_held_out_pairs_are_told_apart(pairs: Callable[..., Path], kind: str) -> None:
    """After some steps the chosen style wins on pairs that were not trained on."""
    with make_run(pairs(kind), "train.learning_rate=0.01", "train.epochs=8") as run:
        assert run.validation is not None
        for step in range(run.num_steps):
            update(run, run.loader.batch(step), step)
        measured = evaluate_loss(run, run.validation.all_batches())
    assert measured is not None
    assert dict(zip(run.objective.metric_names, measured[1:], strict=True))["reward_accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIR_NAMES)
def test_every_loss_widens_the_margin(pairs: Callable[..., Path], kind: str) -> None:
    """The chosen reward gains on the rejected one; rewards of all kinds are finite."""
    objective = {"name": kind, "label_smoothing": 0.001} if kind == "exo" else kind
    with make_run(pairs(objective), "train.learning_rate=0.01") as run:
        found: list[list[float]] = []
        for step in range(12):
            numbers = update(run, run.loader.batch(step), step)
            assert numbers is not None
            found.append(numbers.tolist())
    assert all(math.isfinite(number) for numbers in found for number in numbers)
    margins = [numbers[4] for numbers in found]
    assert margins[-1] > margins[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_preferences_resume_exactly(
    pairs: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """Stopped and started again: the reference is still the model before training, bits equal."""
    values = json.loads(pairs("dpo").read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**values, "method": method}))
    run_to_end(recipe, tmp_path / "whole")
    run_and_stop(recipe, tmp_path / "stopped", 7)
    run_to_end(recipe, tmp_path / "stopped")
    assert final_bytes(tmp_path / "stopped") == final_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_metrics_are_in_the_event_stream(pairs: Callable[..., Path], tmp_path: Path) -> None:
    """Steps and evaluations carry the rewards."""
    run_to_end(pairs("dpo"), tmp_path / "run", listeners=[])
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for kind in ("step", "evaluation"):
        last = [event for event in events if event["event"] == kind][-1]
        assert {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"} < set(last)


@pytest.mark.parametrize(
    ("rows", "found", "tries"),
    [
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
         "rows of other kinds alone: a conversation (1)", "objective=sft"),
        ([{"text": "a"}, {"text": "b"}], "raw text (2)", "objective=pretrain"),
        ([{"prompt": "q", "completion": "a"}] * 2 + [{"text": "b"}],
         "a prompt with its completion (2), raw text (1)",
         "objective=sft, which learns from such rows; or objective=pretrain"),
        ([{"prompt": "q", "completion": "a", "label": True}] * 30,
         "a rated answer (30)", "objective=kto"),
    ],
)  # fmt: skip
def test_data_without_any_pair_is_named_once(
    pairs: Callable[..., Path], tmp_path: Path, rows: list[Any], found: str, tries: str
) -> None:
    """One error for the file, which says what to write or which objective fits."""
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy in ("stop", "drop"):
        data = {"train": str(path), "validation": 0, "bad_rows": policy}
        with pytest.raises(DataError) as caught, make_run(pairs(data=data)):
            pass
        (problem,) = caught.value.problems
        assert (problem.code, problem.where) == ("data.kind", str(path))
        assert found in problem.found
        assert "a `chosen` and a `rejected` answer" in problem.expected
        assert tries in (caught.value.try_ or "")
        assert caught.value.num_problems == 1


def test_a_row_of_another_kind_among_pairs_is_named(
    pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Where some rows fit, each other one is a problem of its own."""
    path = tmp_path / "mixed.jsonl"
    recipe = pairs(data={"train": str(path)})
    path.write_text(write_pairs(tmp_path, 3).read_text() + json.dumps({"text": "raw"}) + "\n")
    with pytest.raises(DataError) as caught, make_run(recipe):
        pass
    assert [problem.where for problem in caught.value.problems] == [f"{path}:4"]
    assert "correct these rows" in (caught.value.try_ or "")


def test_every_loss_has_a_name() -> None:
    """The recipe's names are the registry's."""
    from typing import get_args

    from tunesmith.config.objective import PairName

    assert sorted(get_args(PairName)) == PAIR_NAMES
    assert len(get_args(PairName)) == len(PAIR_KINDS)


def test_autocast_forgets_the_reference(pairs: Callable[..., Path]) -> None:
    """Half precision, an adapter that does not begin as nothing: the loss must leave ln 2.

    Autocast keeps a cast for each parameter, whose values the reference swaps.
    """
    recipe = pairs("dpo", train={"learning_rate": 0.05, "warmup": 0}, method="loha")
    with make_run(recipe, "model.dtype=bfloat16") as run:
        assert run.autocast_dtype == torch.bfloat16
        losses = []
        for step in range(3):
            found = update(run, run.loader.batch(step), step)
            assert found is not None
            losses.append(float(found[0]))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[2] < losses[0] - 2e-3
