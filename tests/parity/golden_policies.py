"""TRL's advantages and policy losses (GRPO and kin, RLOO), for make_golden.py."""

import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import trl
from make_golden import leaf, result, stand_in

GROUPS, ANSWERS = 3, 4


def advantage_inputs() -> dict[str, list]:
    """Rewards of three groups: mixed, all equal, and one answer that nobody could score."""
    rng = random.Random(5)
    rewards = [[rng.uniform(-1, 2) for _ in range(ANSWERS)] for _ in range(GROUPS)]
    rewards[1] = [0.75] * ANSWERS
    rewards[2][1] = None
    return {"rewards": rewards}


def advantages(inputs: dict[str, list]) -> list[dict[str, Any]]:
    made = [
        named(f"grpo_{scale}", from_rewards(trl.GRPOTrainer, inputs, scale_rewards=scale))
        for scale in ("group", "batch", "none")
    ]
    for name, is_normalized in (("rloo", False), ("rloo_normalized", True)):
        found = from_rewards(trl.RLOOTrainer, inputs, normalize_advantages=is_normalized)
        made.append(named(name, found))
    return made


def named(name: str, found: list[float]) -> dict[str, Any]:
    return {"name": name, "advantages": found}


def from_rewards(trainer_class: type, inputs: dict[str, list], **settings: Any) -> list[float]:
    """The trainer's own way from rewards to advantages, with answers of one token."""
    flat = [[float("nan") if r is None else r] for group in inputs["rewards"] for r in group]
    count = len(flat)
    ids = [[1]] * count
    is_grpo = trainer_class is trl.GRPOTrainer
    generated = (ids, ids, None, ids, None, None, None, None) if is_grpo else (ids, ids, ids)
    logps = torch.zeros(count, 1, dtype=torch.float64)
    args = SimpleNamespace(
        per_device_train_batch_size=count, steps_per_generation=1, gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
    )  # fmt: skip
    logs = {"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": []}
    trainer = stand_in(
        args=args, beta=0.0, num_iterations=1,
        num_generations=ANSWERS, num_generations_eval=ANSWERS,
        reward_weights=torch.ones(1, dtype=torch.float64), reward_funcs=[None],
        reward_func_names=["r"],
        reward_clip_range=None, multi_objective_aggregation="sum_then_normalize",
        environment_factories=None, environments=None, tools=None, _is_vlm=False, use_vllm=False,
        mask_truncated_completions=False, pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0), log_multimodal=False, log_completions=False,
        vllm_importance_sampling_correction=False, _pending_extra_logs={}, _pending_metrics={},
        _logs=logs | {"extra": defaultdict(list)},
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: torch.tensor(flat, dtype=torch.float64),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, None, None),
        **settings,
    )  # fmt: skip
    rows = [{"prompt": "?"}] * count
    return trainer_class._generate_and_score_completions(trainer, rows)["advantages"].tolist()


def policy_inputs() -> dict[str, list]:
    """Five answers of 1 to 6 tokens; ratios on both sides of the clip."""
    rng = random.Random(6)
    lengths = [6, 3, 1, 5, 4]

    def rows(low: float, high: float) -> list[list[float]]:
        return [[rng.uniform(low, high) for _ in range(n)] for n in lengths]

    logp = rows(-3, -0.1)
    return {
        "logp": logp,
        "old_logp": shifted(logp, rows(-0.6, 0.6)),
        "ref_logp": shifted(logp, rows(-0.6, 0.6)),
        "advantages": [1.2, -0.7, 0.4, -1.5, 0.0],
    }


def shifted(rows: list[list[float]], shifts: list[list[float]]) -> list[list[float]]:
    return [[x + d for x, d in zip(*both, strict=True)] for both in zip(rows, shifts, strict=True)]


POLICY_CASES: dict[str, dict[str, Any]] = {
    "grpo": {"averaging": "answer"},
    "grpo_kl": {"averaging": "answer", "kl_weight": 0.1},
    "dapo": {"averaging": "token", "clip_high": 0.28},
    "bnpo": {"averaging": "token"},
    "dr_grpo": {"averaging": "constant", "max_tokens": 8},
    "grpo_capped": {"averaging": "answer", "ratio_cap": 1.4},
    "gspo": {"averaging": "answer", "ratio_level": "answer", "clip_low": 0.03, "clip_high": 0.04},
}


LOSS_TYPES = {"grpo_kl": "grpo", "grpo_capped": "grpo", "gspo": "grpo"}


def policies(inputs: dict[str, list]) -> list[dict[str, Any]]:
    made = [policy_case(name, settings, inputs) for name, settings in POLICY_CASES.items()]
    return [*made, rloo_case(inputs)]


def policy_case(name: str, settings: dict[str, Any], inputs: dict[str, list]) -> dict[str, Any]:
    logp, mask = padded(inputs["logp"], is_leaf=True)
    level = "sequence" if settings.get("ratio_level") == "answer" else "token"
    args = SimpleNamespace(
        delta=settings.get("ratio_cap"), use_bias_correction_kl=False, steps_per_generation=1
    )
    trainer = stand_in(
        args=args, loss_type=LOSS_TYPES.get(name, name),
        importance_sampling_level=level,
        beta=settings.get("kl_weight", 0.0), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1,
        epsilon_low=settings.get("clip_low", 0.2), epsilon_high=settings.get("clip_high", 0.2),
        max_completion_length=settings.get("max_tokens"), _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    batch = batch_of(inputs, mask)
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    return {"name": name, "settings": settings, **ragged(result(loss, logp=logp), mask)}


def rloo_case(inputs: dict[str, list]) -> dict[str, Any]:
    logp, mask = padded(inputs["logp"], is_leaf=True)
    trainer = stand_in(
        epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    batch = batch_of(inputs, mask)
    batch["old_logps"] = (batch["old_per_token_logps"] * mask).sum(1)
    loss = trl.RLOOTrainer._compute_loss(trainer, trainer.model, batch)
    return {"name": "rloo", "settings": {}, **ragged(result(loss, logp=logp), mask)}


def batch_of(inputs: dict[str, list], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "prompt_ids": mask,
        "prompt_mask": mask,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64),
        "old_per_token_logps": padded(inputs["old_logp"])[0],
        "ref_per_token_logps": padded(inputs["ref_logp"])[0],
        "num_items_in_batch": mask.sum(),
    }


def padded(rows: list[list[float]], is_leaf: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    values = [[*row, *[0.0] * (width - len(row))] for row in rows]
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return (leaf(values) if is_leaf else torch.tensor(values, dtype=torch.float64)), mask


def ragged(found: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    rows, lengths = found["gradients"]["logp"], mask.sum(1).tolist()
    found["gradients"]["logp"] = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    return found


POLICIES = {
    "advantages": (advantage_inputs, advantages),
    "policies": (policy_inputs, policies),
}
