"""Sampling with vLLM, on a stand-in for it (`vllm_stand_in.py`): vLLM itself was never run here."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import final_bytes, make_run, run_and_stop, run_to_end
from rollout.vllm_stand_in import make_module
from tunesmith import load_recipe
from tunesmith.engine.events import read_events
from tunesmith.engine.step import Run, update
from tunesmith.errors import RecipeError
from tunesmith.infer.vllm_engine import VllmEngine
from tunesmith.model.merged import cannot_be_merged, merged_weights
from tunesmith.rollout.rollouts import Rollouts


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", make_module())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """A recipe of GRPO that samples with vLLM."""

    def make(**changes: Any) -> Path:
        letters = {"kind": "regex", "pattern": "[a-m]"}
        objective = {"name": "grpo", "answers": 4, "max_new_tokens": 6, "rewards": letters}
        objective |= {"engine": "vllm", **changes.pop("objective", {})}
        plain: dict[str, Any] = {
            "objective": objective,
            "method": {"name": "lora", "rank": 4, "dropout": 0.0},
            "train": {"epochs": 1, "global_batch": 6, "micro_batch_tokens": 400},
        }
        return tiny_recipe(**{**plain, **changes})

    return make


def sampled(run: Run, step: int = 0) -> Rollouts:
    rollouts = run.rollouts
    assert isinstance(rollouts, Rollouts)
    assert isinstance(rollouts.engine, VllmEngine)
    assert rollouts.batch(run.loader.batch(step), step, 400, lambda: False) is not None
    return rollouts


def test_it_is_refused_before_the_model_is_loaded(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("tunesmith.train.build_model", load)
    with pytest.raises(RecipeError, match=r"recipe\.engine.*not installed") as caught:
        run_to_end(recipe(), tmp_path / "out")
    assert "tunesmith[vllm]" in str(caught.value)
    assert "engine: transformers" in str(caught.value)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"method": {"name": "prompt_tuning"}}, "PROMPT_TUNING"),
        ({"method": {"name": "lora"}, "model": {"new_tokens": ["<x>"]}}, "new tokens"),
        ({"model": {"quantize": "nf4"}}, "quantize"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    recipe: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    path = recipe(**{k: v for k, v in changes.items() if k == "method"})
    more = [f"model.{k}={v}" for k, v in changes.get("model", {}).items()]
    from tunesmith.rollout.engines import check_engine

    with pytest.raises(RecipeError, match=rf"recipe\.engine.*{found}"):
        check_engine(load_recipe(path, more).recipe)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"top_p": 0.9, "temperature": 0.7}, "temperature 1"),
        ({"engine": "transformers", "engine_memory": 0.5}, "engine: vllm"),
    ],
)
def test_settings_without_an_effect_are_refused(
    recipe: Callable[..., Path], objective: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe(objective=objective))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_p": 0.8, "top_k": 40}], ids=str
)
def test_it_samples_from_the_weights_as_they_are(
    recipe: Callable[..., Path], settings: dict[str, Any]
) -> None:
    """After updates, too: its log-probabilities are those of the training's own forward."""
    with make_run(recipe(objective={"updates": 2, **settings}), "train.learning_rate=0.05") as run:
        first = sampled(run).current
        assert first is not None
        for step in range(2):
            sampled(run, step)
            update(run, sampled(run, step).packed(step, 400), step)
        before = [p.detach().clone() for p in run.model.parameters()]
        rollouts = sampled(run, 2)
        for parameter, old in zip(run.model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        assert rollouts.current is not None
        columns = rollouts.current.columns_T
        torch.testing.assert_close(columns["engine_logp"], columns["old_logp"], rtol=0, atol=1e-4)
        assert rollouts.engine.llm.worker.num_loads == 2
        assert any((p - q).abs().max() > 1e-3 for p, q in _beside(run, rollouts))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def _beside(run: Run, rollouts: Rollouts) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The base's weights and those that were sent."""
    sent = dict(rollouts.engine.llm.worker.model.named_parameters())
    base = run.model.get_base_model().named_parameters()
    plain = {name.replace(".base_layer", ""): p for name, p in base if "lora" not in name}
    return [(plain[name], sent[name]) for name in sent]


@pytest.mark.usefixtures("installed")
def test_a_sampling_repeats_and_another_does_not(recipe: Callable[..., Path]) -> None:
    found = []
    for number in range(2):
        with make_run(recipe(), f"output={recipe().parent / str(number)}") as run:
            rollouts = sampled(run)
            assert rollouts.current is not None
            found.append(rollouts.current.answers)
    assert found[0] == found[1]
    assert len(set(found[0])) > len(found[0]) // 2


@pytest.mark.usefixtures("installed")
def test_a_signal_ends_it_within_a_token(recipe: Callable[..., Path]) -> None:
    with make_run(recipe()) as run:
        rollouts = run.rollouts
        assert isinstance(rollouts, Rollouts)
        asked = iter([False, False, True])
        assert rollouts.batch(run.loader.batch(0), 0, 400, lambda: next(asked)) is None
        assert rollouts.engine.llm.llm_engine.num_steps == 2
        assert rollouts.current is None


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_a_run_with_it_learns_measures_and_resumes(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(objective={"updates": 2, "engine_weight_cap": 2.0, "engine_memory": 0.4})
    run_to_end(path, tmp_path / "whole")
    run_and_stop(path, tmp_path / "parts", step=3)
    run_to_end(path, tmp_path / "parts")
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")
    events = list(read_events(tmp_path / "whole" / "events.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    # The ratio of the two engines: here they are one.
    assert all(math.isclose(event["engine_ratio"], 1.0, abs_tol=1e-3) for event in steps[::2])
    assert any(event["event"] == "evaluation" for event in events)


def with_method(recipe: Path, method: dict[str, Any]) -> Path:
    """The recipe with nothing of LoRA's settings left."""
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "method": method}))
    return recipe


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "layers": 1},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera"},
    "trainable_tokens": {"name": "lora", "rank": 4, "train_tokens": [5, 9]},
}


@pytest.mark.parametrize("name", METHODS)
def test_merged_weights_are_those_of_the_adapted_model(
    tiny_recipe: Callable[..., Path], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    with make_run(with_method(tiny_recipe(), METHODS[name])) as run:
        torch.manual_seed(1)
        with torch.no_grad():
            for _, parameter in run.parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        assert cannot_be_merged(run.model) is None
        place = getattr(run.model, "get_base_model", lambda: run.model)().config.name_or_path
        plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        before = [p.detach().clone() for p in run.model.parameters()]
        own, sent = dict(plain.named_parameters()), dict(merged_weights(run.model))
        for parameter, old in zip(run.model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        assert sent.keys() == own.keys()
        with torch.no_grad():
            for weight_name, weight in sent.items():
                own[weight_name].copy_(weight)
        run.model.eval()
        base = run.model.get_base_model() if hasattr(run.model, "peft_config") else run.model
        base.set_attn_implementation("sdpa")
        ids = torch.tensor([[5, 9, 100, 7, 200, 3]])
        with torch.no_grad():
            ours = run.model(input_ids=ids).logits
            theirs = plain(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def test_a_prompt_cannot_be_merged(tiny_recipe: Callable[..., Path]) -> None:
    with make_run(with_method(tiny_recipe(), {"name": "prompt_tuning"})) as run:
        assert "no part of the base model" in str(cannot_be_merged(run.model))
