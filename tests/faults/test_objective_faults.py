"""Every objective goes on exactly; sampled answers that are half used are learned from to the end.

An objective on sampled answers has more to lose than weights: the answers themselves, what was
known of them before the first update, PPO's value head and its KL weight.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_byte_tokenizer, make_tiny_config
from engine.runs import make_run
from faults.runs import KILLED, Place, count_points, train_to_the_end
from tunesmith.engine.loop import fit
from tunesmith.engine.state import TrainState
from tunesmith.errors import OutOfMemoryError, RewardError
from tunesmith.io.fault import arm
from tunesmith.rollout.rollouts import Rollouts

slow = pytest.mark.slow
whole = pytest.mark.whole

LETTERS = {"kind": "regex", "pattern": "[a-m]"}
SAMPLING = {"max_new_tokens": 8, "rewards": [LETTERS]}
HALF_USED = {"updates": 2, "mini_batches": 2}
"""Four steps learn from the same answers; checkpoints come every three."""

OBJECTIVES: dict[str, Any] = {
    "sft": "sft",
    "pretrain": "pretrain",
    "distill": {"name": "distill"},
    "dpo": "dpo",
    "dpo cached": {"name": "dpo", "reference": "cached"},
    "orpo": "orpo",
    "kto": "kto",
    "reward": "reward",
    "classify": "classify",
    "grpo": {"name": "grpo", "answers": 4, **SAMPLING},
    "rloo": {"name": "rloo", "answers": 4, **SAMPLING},
    "ppo": {"name": "ppo", **SAMPLING, **HALF_USED},
}
POLICIES: dict[str, Any] = {
    "grpo": {**OBJECTIVES["grpo"], **HALF_USED},
    "ppo": {**OBJECTIVES["ppo"], "kl_target": 0.1, "kl_horizon": 20},
}
FEW = ("dpo", "reward", "ppo")
"""Of all objectives, those that are struck in `make test`, too."""


def rows_for(name: str) -> list[dict[str, Any]]:
    """Small data of the kind that an objective learns from."""
    if name.startswith(("dpo", "orpo", "reward")):
        return [
            {
                "prompt": f"A question that two answers share, number {n % 9}",
                "chosen": f"please {n}" + "!" * (n % 4),
                "rejected": f"no {n * 7}" + "?" * (n % 3),
            }
            for n in range(40)
        ]
    if name == "kto":
        return [
            {"prompt": f"question {n}", "completion": f"answer {n * n}", "label": n % 3 != 0}
            for n in range(40)
        ]
    if name == "classify":
        words = ("red", "green", "blue")
        return [{"text": f"thing {n} is {words[n % 3]}", "label": words[n % 3]} for n in range(40)]
    return [{"text": f"The {n}th line of a small book. " * (1 + n % 3)} for n in range(40)]


def save_teacher(folder: Path) -> str:
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    LlamaForCausalLM(make_tiny_config(initializer_range=0.3)).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return str(folder)


def place_for(
    make_place: Callable[..., Place], folder: Path, objective: Any, name: str = "", **changes: Any
) -> Place:
    """A place whose recipe has an objective, with data for it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = name or str(objective["name"])
    plain: dict[str, Any] = {"objective": objective, "train": {"epochs": 2}}
    if name == "distill":
        plain["objective"] = {**objective, "teacher": save_teacher(folder / "teacher")}
    elif name in ("grpo", "rloo", "ppo"):
        # 30 prompts, 6 at a time: four samplings of 24 answers, or 6 with PPO.
        plain["rows"], plain["method"] = 30, {"dropout": 0.0}
        plain["train"] = {"epochs": 1, "global_batch": 6, "micro_batch_tokens": 400}
    elif name != "sft":
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_for(name)))
        plain["data"] = {"train": str(file), "validation": 0.2}
    return make_place(folder, **{**plain, **changes})


@pytest.fixture(scope="session")
def oracle_of(
    make_place: Callable[..., Place], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Place]:
    """What nothing happened to, by the name of a recipe; each is run once."""
    known: dict[str, Place] = {}

    def find(name: str, objective: Any) -> Place:
        key = json.dumps(objective)
        if key not in known:
            place = place_for(make_place, tmp_path_factory.mktemp("oracle"), objective, name)
            train_to_the_end(place)
            known[key] = place
        return known[key]

    return find


def kept_answers(place: Place) -> dict[str, torch.Tensor]:
    """What the last checkpoint has of sampled answers, and the value head."""
    files = (place.checkpoints[-1] / "rollout").glob("*.safetensors")
    return {f"{f.stem}.{n}": t for f in files for n, t in load_file(f).items()}


def assert_equal(place: Place, oracle: Place) -> None:
    """Weights, optimizer, losses, answers and the value head, tolerance 0."""
    assert place.final_bytes() == oracle.final_bytes()
    assert place.losses == oracle.losses
    ours, theirs = kept_answers(place), kept_answers(oracle)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for file in (oracle.output / "samples").glob("*.jsonl"):
        assert (place.output / "samples" / file.name).read_bytes() == file.read_bytes()


# Row 14: each objective


def struck(marks: Sequence[pytest.MarkDecorator] = (whole,)) -> list[Any]:
    """Each objective's name; most are left to the whole matrix."""
    return [pytest.param(n, marks=() if n in FEW else marks) for n in OBJECTIVES]


@slow
@pytest.mark.parametrize("name", struck())
def test_row_14_sigkill_with_each_objective(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path, name: str
) -> None:
    """SIGKILL at a random step, in its backward or before its update: the same bits."""
    oracle = oracle_of(name, OBJECTIVES[name])
    chosen = random.Random(name)
    step = chosen.randrange(1, len(oracle.losses))
    point = chosen.choice(("step.micro", "step.update"))
    place = place_for(make_place, tmp_path, OBJECTIVES[name], name)
    assert place.train(fault=f"{point}:step={step}:kill") == KILLED, place.printed[-3000:]
    train_to_the_end(place)
    assert_equal(place, oracle)


@slow
@whole
@pytest.mark.parametrize("name", OBJECTIVES)
def test_row_14_sigterm_with_each_objective(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path, name: str
) -> None:
    """SIGTERM at a random step: saved at that step, exit 143, then the same bits."""
    oracle = oracle_of(name, OBJECTIVES[name])
    step = random.Random(f"{name} again").randrange(1, len(oracle.losses))
    place = place_for(make_place, tmp_path, OBJECTIVES[name], name)
    assert place.train(fault=f"step.update:step={step}:term") == 143, place.printed[-3000:]
    assert place.checkpoints[-1].name == f"step-{step + 1:08d}"
    train_to_the_end(place)
    assert_equal(place, oracle)


# Row 11: half-used answers

STRIKES = [
    ("grpo", "step.update:step=6:kill"),
    ("grpo", "step.micro:step=9:kill"),
    ("grpo", "save.write:step=6:kill"),
    ("grpo", "sample.token:30:kill"),
    ("grpo", "sample.judge:4:kill"),
    ("grpo", "sample.look:4:kill"),
    ("ppo", "step.update:step=5:kill"),
    ("ppo", "step.update:step=10:kill"),
    ("ppo", "save.write:step=9:kill"),
    ("ppo", "sample.token:40:kill"),
    ("ppo", "sample.look:3:kill"),
]


@slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(*each, marks=() if number % 5 == 0 else whole)
        for number, each in enumerate(STRIKES)
    ],
)
def test_row_11_sigkill_with_half_used_answers(
    make_place: Callable[..., Place],
    oracle_of: Callable[..., Place],
    tmp_path: Path,
    name: str,
    fault: str,
) -> None:
    """SIGKILL in sampling, rewarding, looking, between the updates on one set, in a save."""
    oracle = oracle_of(name, POLICIES[name])
    place = place_for(make_place, tmp_path, POLICIES[name])
    assert place.train(fault=fault) == KILLED, place.printed[-3000:]
    train_to_the_end(place)
    assert_equal(place, oracle)


@slow
@pytest.mark.parametrize("name", POLICIES)
def test_row_11_the_same_answers_are_gone_on_with(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path, name: str
) -> None:
    """Stopped after the second of four updates: the answers come from the checkpoint."""
    place = place_for(make_place, tmp_path, POLICIES[name])
    assert place.train(fault="step.update:step=5:term") == 143, place.printed[-3000:]
    assert place.checkpoints[-1].name == "step-00000006"
    written = place.output / "samples" / "step-00000005.jsonl"
    before = written.stat().st_mtime_ns
    hits = tmp_path / "hits"
    assert place.train(TUNESMITH_FAULT_HITS=str(hits)) == 0, place.printed[-3000:]
    assert written.stat().st_mtime_ns == before
    points = count_points(hits)
    steps = len(place.losses)
    # What is rewarded: samplings of steps 8, 12, ..., and the validation at the end.
    assert points["sample.judge"] == (steps - 8) // 4 + 1
    assert_equal(place, oracle_of(name, POLICIES[name]))


@slow
@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=whole)])
def test_row_29_sigterm_while_sampling(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path, name: str
) -> None:
    """SIGTERM before a token of an answer: no further token, the steps before are saved."""
    place, hits = place_for(make_place, tmp_path, POLICIES[name]), tmp_path / "hits"
    code = place.train(fault="sample.token:30:term", TUNESMITH_FAULT_HITS=str(hits))
    assert code == 143, place.printed[-3000:]
    assert count_points(hits)["sample.token"] == 30
    train_to_the_end(place)
    assert_equal(place, oracle_of(name, POLICIES[name]))


# Rows 40, 41: memory and hangs


@slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("grpo", "step.backward:tokens>150:oom"),
        pytest.param("grpo", "sample.look:tokens>150:oom", marks=whole),
        ("ppo", "sample.look:tokens>100:oom"),
        pytest.param("ppo", "step.micro:tokens>100:oom", marks=whole),
    ],
)
def test_row_40_memory_runs_out_at_sampled_answers(
    make_place: Callable[..., Place],
    oracle_of: Callable[..., Place],
    tmp_path: Path,
    name: str,
    fault: str,
) -> None:
    """Looking at answers or learning from them: the same answers, losses within 1e-6."""
    oracle = oracle_of(name, POLICIES[name])
    place = place_for(make_place, tmp_path, POLICIES[name])
    assert place.train(fault=fault) == 0, place.printed[-3000:]
    assert place.losses == pytest.approx(oracle.losses, abs=2e-6)
    for file in (oracle.output / "samples").glob("*.jsonl"):
        assert (place.output / "samples" / file.name).read_bytes() == file.read_bytes()


@slow
def test_row_40_memory_runs_out_in_sampling(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path
) -> None:
    """Half as many answers at once; the same tokens are drawn."""
    oracle = oracle_of("grpo", POLICIES["grpo"])
    place = place_for(make_place, tmp_path, POLICIES["grpo"])
    assert place.train(fault="sample.token:12:oom,sample.token:13:oom") == 0, place.printed[-3000:]
    assert place.losses == pytest.approx(oracle.losses, abs=2e-6)


@slow
@pytest.mark.parametrize(
    ("fault", "code"),
    [("sample.token:*:oom", "memory.one-answer"), ("sample.look:*:oom", "memory.one-sample")],
)
def test_row_40_one_answer_is_too_large(
    make_place: Callable[..., Place], tmp_path: Path, fault: str, code: str
) -> None:
    """Not even one answer can be sampled, or looked at: exit 5."""
    place = place_for(make_place, tmp_path, POLICIES["grpo"])
    assert place.train(fault=fault) == 5, place.printed[-3000:]
    assert code in place.printed
    if code == "memory.one-sample":
        assert "data.jsonl:" in place.printed.split(code)[0]


@slow
def test_row_41_a_reward_function_hangs(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path
) -> None:
    """A reward function does not return: the phase is `reward`, exit 75; then the same bits."""
    limits = ("guard.hang_warn_seconds=1.0", "guard.hang_stop_seconds=4.0")
    place = place_for(make_place, tmp_path, POLICIES["grpo"])
    assert place.train(*limits, fault="sample.judge:3:sleep:90") == 75, place.printed[-3000:]
    (stacks,) = place.output.glob("stacks-*.txt")
    text = stacks.read_text()
    assert text.startswith("phase reward, step 4")
    assert "rollout/build.py" in text
    train_to_the_end(place, *limits)
    assert_equal(place, oracle_of("grpo", POLICIES["grpo"]))


@slow
def test_row_11_a_reward_function_raises(
    make_place: Callable[..., Place], oracle_of: Callable[..., Place], tmp_path: Path
) -> None:
    """An error in a reward function ends the run with the last step saved; then the same bits."""
    place = place_for(make_place, tmp_path, POLICIES["grpo"])
    assert place.train(fault="sample.judge:3:raise:KeyError") == 1
    assert "planted at sample.judge" in place.printed
    assert place.checkpoints[-1].name == "step-00000004"
    train_to_the_end(place)
    assert_equal(place, oracle_of("grpo", POLICIES["grpo"]))


# Row 37: rollbacks


@slow
@pytest.mark.parametrize("name", ["grpo", pytest.param("ppo", marks=whole)])
def test_row_37_a_rollback_among_updates_on_the_same_answers(
    make_place: Callable[..., Place], tmp_path: Path, name: str
) -> None:
    """The restored checkpoint's answers are gone on with, without those to the bad samples; a kill
    behind the rollback gives the same bits."""
    changes: dict[str, Any] = {
        "evaluate": {"every": None},
        "guard": {"rollback_after": 1},
        "checkpoint": {"every_steps": 1},
    }
    bad = "step.micro:samples=9:nan"  # in the second mini-batch of the second sampling
    plain = place_for(make_place, tmp_path / "whole", POLICIES[name], **changes)
    assert plain.train(fault=bad) == 0, plain.printed[-3000:]
    rollbacks = plain.events_of("rollback")
    assert len(rollbacks) == 1, rollbacks
    assert "data.jsonl:10" in rollbacks[0]["message"]
    assert rollbacks[0]["to"] == 5, "a checkpoint between the updates on one set of answers"
    killed = place_for(make_place, tmp_path / "killed", POLICIES[name], **changes)
    step = rollbacks[0]["step"]
    assert killed.train(fault=f"{bad},step.update:step={step}:kill") == KILLED
    assert killed.train(fault=bad) == 0, killed.printed[-3000:]
    assert killed.final_bytes() == plain.final_bytes()


# In this process


@pytest.fixture
def planted() -> Any:
    """Arms faults, and disarms them at the end."""
    yield lambda text: arm({"TUNESMITH_FAULT": text})
    arm({})


@pytest.fixture
def grpo(tiny_recipe: Callable[..., Path]) -> Path:
    return tiny_recipe(
        rows=30,
        objective=POLICIES["grpo"],
        method={"dropout": 0.0},
        train={"epochs": 1, "global_batch": 6, "micro_batch_tokens": 400},
        evaluate={"every": None},
    )


def test_answers_that_nobody_can_judge_teach_nothing(grpo: Path) -> None:
    """All rewards are NaN: no weight changes (without a KL term), and the run goes on.

    It goes on, that is, where answers could be judged before: at the start it is a mistake.
    """
    with make_run(grpo, "train.max_steps=4", "objective.kl_weight=0") as run:
        assert isinstance(run.rollouts, Rollouts)
        rollouts = run.rollouts
        rollouts.judge = replace(rollouts.judge, functions=(lambda a: [math.nan] * len(a),))
        with pytest.raises(RewardError, match=r"reward\.nothing"):
            fit(run, TrainState({}))

        def judge(answers: Sequence[Any]) -> list[float]:
            return [1.0 if rollouts.current is None else math.nan] * len(answers)

        rollouts.judge = replace(rollouts.judge, functions=(judge,))
        before = [parameter.detach().clone() for _, parameter in run.parameters]
        state = fit(run, TrainState({}))
        assert state.step == 4
        assert state.num_skipped == 0
        for (_, after), old in zip(run.parameters, before, strict=True):
            assert torch.equal(after, old)


def test_one_answer_that_nobody_can_judge_counts_nowhere(grpo: Path) -> None:
    """Its advantage is 0, the others of its group are compared with each other."""
    with make_run(grpo, "train.max_steps=1") as run:
        assert isinstance(run.rollouts, Rollouts)
        rollouts = run.rollouts
        rollouts.judge = replace(rollouts.judge, functions=(lambda a: [None, *range(1, len(a))],))
        assert rollouts.batch(run.loader.batch(0), 0, 400, lambda: False) is not None
        experience = rollouts.current
        assert experience is not None
        assert experience.reward_A[:2].isnan().tolist() == [True, False]
        advantage_T = experience.columns_T["advantage"]
        assert advantage_T.isfinite().all()
        of_first = advantage_T[: experience.ends[1]]
        assert not of_first.any()
        assert advantage_T[experience.ends[2] : experience.ends[3]].abs().max() < 1e-6  # the mean


def test_a_bad_sample_leaves_answers_that_are_half_used(grpo: Path) -> None:
    """No checkpoint to go back to: the answers stay, but for those to the samples left out."""
    with make_run(grpo) as run:
        assert isinstance(run.rollouts, Rollouts)
        rollouts, budget = run.rollouts, 400
        given = run.loader.batch(0)
        rollouts.batch(given, 0, budget, lambda: False)
        first = rollouts.current
        assert first is not None
        left_out = given.sample_ids[2]
        loader = replace(run.loader, excluded=frozenset([left_out]))
        rollouts.batch(loader.batch(1), 1, budget, lambda: False)
        second = rollouts.current
        assert second is not None
        assert second.sample_ids == tuple(s for s in first.sample_ids if s != left_out)
        assert second.answers == first.answers[:8] + first.answers[12:]
        kept_T = first.rows([*range(8), *range(12, 24)])
        for name, column in first.columns_T.items():
            assert torch.equal(second.columns_T[name], column[kept_T])
        empty = replace(run.loader, excluded=frozenset(given.sample_ids))
        nothing = rollouts.batch(empty.batch(2), 2, budget, lambda: False)
        assert nothing is not None
        assert nothing.supervised_weight == 0


def test_answers_to_other_samples_are_sampled_anew(grpo: Path) -> None:
    """After a change of the data the checkpoint's answers may be to what is no longer there."""
    with make_run(grpo) as run:
        assert isinstance(run.rollouts, Rollouts)
        rollouts = run.rollouts
        rollouts.batch(run.loader.batch(0), 0, 400, lambda: False)
        other = replace(run.loader.batch(1), sample_ids=run.loader.batch(4).sample_ids)
        rollouts.batch(other, 1, 400, lambda: False)
        assert rollouts.current is not None
        assert rollouts.current.sample_ids == other.sample_ids


@pytest.mark.parametrize("at_once", [1, 3, 4, 9, 64])
def test_any_number_of_answers_at_once_draws_the_same(grpo: Path, at_once: int) -> None:
    """Also fewer than a prompt has answers."""
    with make_run(grpo, f"objective.answers_at_once={at_once}") as run:
        assert isinstance(run.rollouts, Rollouts)
        run.rollouts.batch(run.loader.batch(0), 0, 400, lambda: False)
        found = run.rollouts.current
    with make_run(grpo) as run:
        assert isinstance(run.rollouts, Rollouts)
        run.rollouts.batch(run.loader.batch(0), 0, 400, lambda: False)
        expected = run.rollouts.current
    assert found is not None
    assert expected is not None
    assert found.answers == expected.answers


def test_memory_ends_in_the_middle_of_a_prompts_answers(
    grpo: Path, planted: Callable[[str], None]
) -> None:
    """Down to single answers, then it is told."""
    with make_run(grpo) as run:
        assert isinstance(run.rollouts, Rollouts)
        planted("sample.token:*:oom")
        with pytest.raises(OutOfMemoryError, match=r"memory\.one-answer"):
            run.rollouts.batch(run.loader.batch(0), 0, 400, lambda: False)
        assert run.rollouts.engine.at_once == 1
