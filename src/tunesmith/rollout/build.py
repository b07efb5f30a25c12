"""Puts together what samples answers in a run."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.config.policy import GroupConfig, PpoConfig, SamplingConfig
from tunesmith.engine.oom import TooLargeError
from tunesmith.engine.step import Run
from tunesmith.engine.validation import too_large
from tunesmith.errors import RecipeError
from tunesmith.infer.chat_model import stop_ids
from tunesmith.infer.sample import Drawing
from tunesmith.io.fault import fault
from tunesmith.objectives.policy import PolicyObjective
from tunesmith.objectives.policy_losses import Averaging
from tunesmith.objectives.rewards import Answered, RewardFunction
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.rollout.batches import Packing
from tunesmith.rollout.engines import open_engine
from tunesmith.rollout.judge import Judge
from tunesmith.rollout.rollouts import Rollouts
from tunesmith.types import PackedBatch


def with_rollouts(run: Run, judge: Judge | None) -> Run:
    """The run with what samples its answers, if its objective learns from such."""
    config, objective = run.recipe.objective, run.objective
    if judge is None or not isinstance(objective, PolicyObjective):
        return run
    if not isinstance(config, GroupConfig | PpoConfig):
        raise TypeError(f"{config.name} samples no answers")
    _check_softcap(run.model, config)
    rollouts = Rollouts(
        model=run.model,
        objective=objective,
        config=config,
        engine=open_engine(run, config),
        judge=replace(judge, functions=tuple(_watched(run, each) for each in judge.functions)),
        drawing=Drawing(
            stop_ids=tuple({*stop_ids(run.model, judge.tokenizer), *judge.end_ids}),
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        ),
        packing=Packing(
            _averaging(config),
            config.max_new_tokens,
            pad_to=run.loader.pad_to,
            share_prefixes=run.loader.share_prefixes,
        ),
        loader=run.loader,
        validation=run.validation,
        folder=run.checkpoints.folder.parent / "samples",
        look=lambda batch: _look(run, objective, batch),
        too_large=lambda problem: too_large(run, run.loader, problem),
    )
    run.checkpoints.extras = rollouts
    return replace(run, rollouts=rollouts)


def _averaging(config: GroupConfig | PpoConfig) -> Averaging:
    if isinstance(config, PpoConfig):
        return "token"  # as published code of PPO averages over all tokens of a batch
    if config.averaging == "auto":
        raise ValueError("an unresolved value: objective.averaging")
    return config.averaging


def _check_softcap(model: Any, config: SamplingConfig) -> None:
    """Refuses a temperature before a soft cap, where sampling has it behind."""
    if config.temperature != 1 and getattr(model.config, "final_logit_softcapping", None):
        raise RecipeError(
            "recipe.temperature",
            "objective.temperature",
            found=f"{config.temperature} on a model that caps its logits",
            expected="1.0 for such a model",
        )


def _watched(run: Run, function: RewardFunction) -> RewardFunction:
    """The same reward function, whose hang is noticed."""

    def judge(answers: Sequence[Answered]) -> Sequence[float | None]:
        run.watchdog.beat("reward")
        fault("sample.judge")
        return function(answers)

    return judge


def _look(run: Run, objective: PolicyObjective, batch: PackedBatch) -> dict[str, torch.Tensor]:
    run.watchdog.beat("sample")
    try:
        fault("sample.look", tokens=batch.num_stored_tokens)
        with run.autocast():
            has_reference = objective.reference is not None
            found = objective.look(run.model, batch.to(run.device), with_reference=has_reference)
        return dict(found)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames below hold activations; these must be gone before another try.
        traceback.clear_frames(error.__traceback__)
        raise TooLargeError(batch, str(error)) from None
