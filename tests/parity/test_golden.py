"""Our losses, gradients and rewards against TRL's, which golden.json keeps; TRL is not needed.

Both sides computed in fp64. TOLERANCE is relative to the larger of the value and 1; where TRL
itself goes through fp32, FP32 counts.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.objectives.policy_losses import (
    PolicyForm,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    policy_terms,
    token_rewards,
    token_weights,
    value_losses,
    whiten,
)
from tunesmith.objectives.preference_losses import (
    PairTerms,
    kl_rows,
    kto_kl,
    kto_terms,
    pair_terms,
    reward_terms,
)

TOLERANCE = 1e-12
FP32 = 2e-6
IN_FP32 = {"exo", "orpo", "grpo_group", "grpo_batch", "rloo_normalized"}
"""TRL's EXO takes the logarithm of its labels in fp32, its ORPO casts log-probabilities to it, and
its deviation of rewards has Bessel's factor in fp32."""

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text("utf-8"))
KINDS = {"cdpo": "sigmoid", "rpo": "sigmoid"}


def cases(section: str) -> pytest.MarkDecorator:
    found = GOLDEN[section]["cases"]
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


def inputs(section: str) -> dict[str, torch.Tensor]:
    """The section's inputs as tensors."""
    return {
        name: torch.tensor(values, dtype=torch.float64)
        if isinstance(flat(values)[0], float)
        else torch.tensor(values)
        for name, values in GOLDEN[section]["inputs"].items()
    }


def flat(values: Any) -> list[Any]:
    return [x for row in values for x in flat(row)] if isinstance(values, list) else [values]


def agree(case: dict[str, Any], loss: torch.Tensor, **leaves: torch.Tensor) -> None:
    """The loss, and its gradient in every leaf, are those of the case."""
    near = {"rel": tolerance(case), "abs": tolerance(case)}
    assert loss.item() == pytest.approx(case["loss"], **near)
    for name, ours in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        expected = flat(case["gradients"][name])
        assert flat(ours.tolist()) == pytest.approx(expected, **near), name


def tolerance(case: dict[str, Any]) -> float:
    return FP32 if case["name"] in IN_FP32 else TOLERANCE


def agree_on_rewards(case: dict[str, Any], terms: PairTerms) -> None:
    for side in ("chosen_reward", "rejected_reward"):
        ours = getattr(terms, f"{side}_P").mean().item()
        assert ours == pytest.approx(case[side], rel=tolerance(case)), side


@cases("pairs")
def test_pairs(case: dict[str, Any]) -> None:
    x = inputs("pairs")
    if case["name"] == "cdpo":  # see make_golden.ONE_PAIR
        x = {name: values[:1] for name, values in x.items()}
    chosen, rejected = x["chosen_logp"].requires_grad_(), x["rejected_logp"].requires_grad_()
    terms = pair_terms(
        KINDS.get(case["name"], case["name"]), chosen, rejected,
        chosen_ref_P=x["chosen_ref"], rejected_ref_P=x["rejected_ref"],
        chosen_tokens_P=x["chosen_tokens"], rejected_tokens_P=x["rejected_tokens"],
        **case["settings"],
    )  # fmt: skip
    loss = mean_loss(terms, x["chosen_tokens"], case["settings"].get("sft_weight", 0.0))
    agree(case, loss, chosen_logp=chosen, rejected_logp=rejected)
    agree_on_rewards(case, terms)


def mean_loss(terms: PairTerms, tokens_P: torch.Tensor, sft_weight: float) -> torch.Tensor:
    """The mean over pairs; but TRL takes that of the SFT part over the batch's tokens."""
    loss = terms.preference_P.mean()
    if terms.nll_P is not None:
        loss = loss + sft_weight * (terms.nll_P * tokens_P).sum() / tokens_P.sum()
    return loss


@cases("reference_free")
def test_reference_free_from_logits(case: dict[str, Any]) -> None:
    x = inputs("reference_free")
    logits, labels = x["logits"].requires_grad_(), x["labels"][:, 1:]
    token_logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    is_target = labels != -100
    chosen, rejected = (token_logp * is_target).sum(1).chunk(2)
    chosen_tokens, rejected_tokens = is_target.sum(1).chunk(2)
    terms = pair_terms(
        case["name"], chosen, rejected,
        chosen_tokens_P=chosen_tokens, rejected_tokens_P=rejected_tokens, **case["settings"],
    )  # fmt: skip
    own = {"cpo": 1.0, "orpo": 1.0, "simpo": 0.0}[case["name"]]
    loss = mean_loss(terms, chosen_tokens, case["settings"].get("sft_weight", own))
    agree(case, loss, logits=logits)
    agree_on_rewards(case, terms)


@cases("kto")
def test_kto(case: dict[str, Any]) -> None:
    x = inputs("kto")
    sign = -1 if case["name"] == "kto_kl_below_0" else 1
    kl = kto_kl(sign * x["mismatched_logp"], sign * x["mismatched_ref"])
    if case["settings"]["kind"] == "kto":
        assert kl.item() == pytest.approx(case["kl"], abs=TOLERANCE)
    logp = x["logp"].requires_grad_()
    terms = kto_terms(logp, x["ref"], x["is_good"], kl=kl, **case["settings"])
    agree(case, terms.loss_A.mean(), logp=logp)


@cases("reward")
def test_reward(case: dict[str, Any]) -> None:
    x = inputs("reward")
    chosen, rejected = x["chosen_score"].requires_grad_(), x["rejected_score"].requires_grad_()
    margin = x["margin"] if case["name"] == "margin" else None
    terms = reward_terms(chosen, rejected, margin, **case["settings"])
    agree(case, terms.loss_P.mean(), chosen_score=chosen, rejected_score=rejected)


@cases("divergence")
def test_divergence(case: dict[str, Any]) -> None:
    x = inputs("divergence")
    student = x["student"].requires_grad_()
    loss_R = kl_rows(student, x["teacher"], case["name"], **case["settings"])
    agree(case, loss_R.sum(), student=student)


@cases("advantages")
def test_advantages(case: dict[str, Any]) -> None:
    rows = GOLDEN["advantages"]["inputs"]["rewards"]
    rewards = torch.tensor(
        [[float("nan") if r is None else r for r in row] for row in rows], dtype=torch.float64
    )
    if case["name"].startswith("grpo"):
        ours = group_advantages(rewards, scale=case["name"].removeprefix("grpo_"))
    else:
        ours = leave_one_out_advantages(rewards, is_normalized=case["name"].endswith("normalized"))
    assert flat(ours.tolist()) == pytest.approx(case["advantages"], abs=tolerance(case))


@cases("policies")
def test_policies(case: dict[str, Any]) -> None:
    x = GOLDEN["policies"]["inputs"]
    lengths = torch.tensor([len(row) for row in x["logp"]])
    answer_T = torch.arange(len(lengths)).repeat_interleave(lengths)
    logp, old, ref = (double(flat(x[name])) for name in ("logp", "old_logp", "ref_logp"))
    logp.requires_grad_()
    settings = dict(case["settings"])
    averaging = {key: settings.pop(key) for key in ("averaging", "max_tokens") if key in settings}
    form, advantage_A = PolicyForm(**settings), double(x["advantages"])
    if case["name"] == "rloo":
        sums = torch.zeros(2, len(lengths), dtype=torch.float64)
        sums = sums.index_add(1, answer_T, torch.stack([logp, old]))
        loss = policy_terms(sums[0], sums[1], advantage_A, form=form).loss_T.mean()
    else:
        per_token = {"ref_logp_T": ref, "answer_T": answer_T}
        terms = policy_terms(logp, old, advantage_A[answer_T], form=form, **per_token)
        weight_T, divisor = token_weights(answer_T, len(lengths), dtype=torch.float64, **averaging)
        loss = (terms.loss_T * weight_T).sum() / divisor
    agree(case, loss, logp=logp)


def ppo_inputs() -> dict[str, torch.Tensor]:
    """TRL gives an answer's end one more step than it has tokens, which carries the score."""
    x = inputs("ppo")
    return {**x, "is_token": ~x["padding_mask"], "is_step": ~x["padding_mask_p1"]}


def test_ppo_advantages() -> None:
    x, settings = ppo_inputs(), GOLDEN["ppo"]["cases"][0]["settings"]
    rewards = token_rewards(
        x["scores"], x["logprobs"], x["ref_logprobs"], x["is_step"], kl_weight=settings["kl_coef"]
    )
    near(rewards, x["rewards"])
    advantages, returns = generalized_advantages(
        rewards, x["values"], x["is_step"], discount=settings["gamma"], decay=settings["lam"]
    )
    near(returns, x["returns"] * x["is_step"])
    near(whiten(advantages, x["is_token"]), x["advantages"], FP32)  # TRL's Bessel factor again


@cases("ppo")
def test_ppo_losses(case: dict[str, Any]) -> None:
    x, settings = ppo_inputs(), case["settings"]
    if case["name"] == "pg_loss":
        leaf = x["new_logprobs"].requires_grad_()
        clip = settings["cliprange"]
        form = PolicyForm(clip_low=clip, clip_high=clip)
        loss_AL = policy_terms(leaf, x["logprobs"], x["advantages"], form=form).loss_T
        agree(case, loss_AL[x["is_token"]].mean(), new_logprobs=leaf)
    else:
        leaf = x["vpred"].requires_grad_()
        clip = settings["cliprange_value"]
        loss_AL = value_losses(leaf, x["values"], x["returns"], clip=clip)
        agree(case, loss_AL[x["is_step"]].mean(), vpred=leaf)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
