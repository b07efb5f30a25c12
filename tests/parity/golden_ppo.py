"""Adds to golden.json what the PPO of TRL 1.10, the last that has one, makes of small tensors.

    PYTHONPATH=FOLDER/WITH/TRL/1.10 PATH/TO/PYTHON tests/parity/golden_ppo.py

TRL's whole PPO is one method, `train`. It runs here on a stand-in, with generation and forward
passes replaced by fixed tensors, up to its first backward, where its variables are read.
"""

import json
import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import trl
from make_golden import GOLDEN, as_lines, result, stand_in
from trl.experimental.ppo import ppo_trainer

ANSWERS = [[3, 2, 1, 3, 2], [2, 3, 1, 0, 0], [1, 0, 0, 0, 0], [3, 3, 2, 1, 0]]
"""Tokens of four answers; 0 is padding. The prompt is two tokens more."""

SETTINGS = {
    "kl_coef": 0.05,
    "gamma": 0.98,
    "lam": 0.9,
    "cliprange": 0.2,
    "cliprange_value": 0.3,
    "vf_coef": 0.1,
}


class FirstBackwardError(Exception):
    """Carries the variables of TRL's `train` out of it."""

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__()
        self.variables = variables


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    rng = random.Random(seed)
    count = torch.Size(shape).numel()
    numbers = [rng.gauss(0, 1) for _ in range(count)]
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def run() -> dict[str, Any]:
    """TRL's variables at its first backward."""
    count, length = len(ANSWERS), len(ANSWERS[0])
    prompts, responses = torch.full((count, 2), 2), torch.tensor(ANSWERS)
    old = random_tensor(0, count, length, 4)
    shape = (count, length + 2, 4)
    reference = SimpleNamespace(logits=random_tensor(1, *shape))
    new_logits = 0.5 * random_tensor(2, *shape)
    new_logits[:, 1:-1] += old
    new_values = random_tensor(3, *shape[:2], 1).requires_grad_()
    old_values = new_values.detach() + 0.4 * random_tensor(4, *shape[:2], 1)
    policy = SimpleNamespace(logits=new_logits.requires_grad_() * 1)
    trainer = stand_in_trainer(prompts)

    def forward(model: Any, *_: Any) -> Any:
        return reference if model is trainer.ref_model else (policy, new_values)

    def get_reward(model: Any, *_: Any) -> Any:
        return old_values, 2 * random_tensor(5, count), None

    def backward(_: torch.Tensor) -> None:
        raise FirstBackwardError(dict(sys._getframe(1).f_locals))

    trainer.accelerator.backward = backward
    whole = torch.cat([prompts, responses], dim=1)
    replaced = {
        "batch_generation": lambda *_: (whole, old),
        "forward": forward,
        "get_reward": get_reward,
        "unwrap_model_for_generation": lambda model, *_, **__: nullcontext(model),
    }
    np.random.seed(0)  # TRL shuffles its micro-batches with it
    with mock.patch.multiple(ppo_trainer, **replaced):
        try:
            ppo_trainer.PPOTrainer.train(trainer)
        except FirstBackwardError as found:
            return found.variables
    raise RuntimeError("TRL's PPO ended without a backward")


def stand_in_trainer(prompts: torch.Tensor) -> SimpleNamespace:
    count = len(prompts)
    sizes = (
        "batch_size", "local_batch_size", "local_mini_batch_size", "per_device_train_batch_size",
        "local_rollout_forward_batch_size", "total_episodes",
    )  # fmt: skip
    ones = (
        "num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps", "num_total_batches",
    )  # fmt: skip
    nothing = ("logging_steps", "eval_steps", "save_steps", "missing_eos_penalty")
    args = SimpleNamespace(
        **SETTINGS, **dict.fromkeys(sizes, count), **dict.fromkeys(ones, 1),
        **dict.fromkeys(nothing),
        response_length=5, temperature=1.0, kl_estimator="k1", whiten_rewards=False,
        ds3_gather_for_generation=False,
    )  # fmt: skip
    trainer = stand_in(
        args=args, optimizer=None, is_deepspeed_enabled=False, stop_token_id=None, control=None,
        model=SimpleNamespace(train=lambda: None, policy=None, value_model=None),
        ref_model=SimpleNamespace(), reward_model=SimpleNamespace(),
        processing_class=SimpleNamespace(pad_token_id=0, eos_token_id=1),
        dataloader=[{"input_ids": prompts}], train_dataset_len=count, state=SimpleNamespace(),
        callback_handler=SimpleNamespace(on_train_begin=lambda *_: None),
    )  # fmt: skip
    trainer.accelerator.print = lambda _: None
    trainer.accelerator.unwrap_model = lambda model: model
    trainer.accelerator.accumulate = lambda _: nullcontext()
    return trainer


def section() -> dict[str, Any]:
    """Tensors are in the order of the micro-batch, which TRL shuffles."""
    found = run()
    order = torch.as_tensor(found["micro_batch_inds"])
    whole = ("scores", "logprobs", "ref_logprobs", "rewards", "values", "padding_mask",
             "padding_mask_p1", "advantages", "returns")  # fmt: skip
    inputs = {name: found[name][order].tolist() for name in whole}
    inputs |= {name: found[name].tolist() for name in ("new_logprobs", "vpred")}
    cases = [
        {"name": name, "settings": SETTINGS, **result(found[name], **{leaf: found[leaf]})}
        for name, leaf in (("pg_loss", "new_logprobs"), ("vf_loss", "vpred"))
    ]
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    return {"versions": versions, "inputs": inputs, "cases": cases}


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text("utf-8"))
    golden["ppo"] = section()
    GOLDEN.write_text(as_lines(golden), "utf-8")
