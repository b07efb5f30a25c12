"""Advantages and policy losses against their papers' equations, in Python loops over tokens.

Gradients come by the complex step, as in test_preference_losses.py: both agree to 1e-12.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.objectives.policy_losses import (
    PolicyForm,
    engine_weights,
    generalized_advantages,
    group_advantages,
    informative_groups,
    leave_one_out_advantages,
    next_kl_weight,
    overlong_penalty,
    policy_terms,
    reference_kl,
    token_rewards,
    token_weights,
    value_losses,
    whiten,
)

STEP = 1e-30
NAN = float("nan")
Number = complex | float

rng = random.Random(11)
LENGTHS = [4, 1, 6, 3]
ANSWER = [a for a, n in enumerate(LENGTHS) for _ in range(n)]
LOGP = [rng.uniform(-3, -0.1) for _ in ANSWER]
OLD = [x + rng.uniform(-0.7, 0.7) for x in LOGP]
REF = [x + rng.uniform(-0.7, 0.7) for x in LOGP]
ADVANTAGE = [1.3, -0.8, -1.1, 0.6]
REWARDS = [[rng.uniform(-1, 1) for _ in range(4)] for _ in range(3)]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Any) -> None:
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx(
        double(expected).flatten().tolist(), rel=1e-12, abs=1e-12
    )


def gradient(loss: Callable[[list[Number]], Number], at: Sequence[float]) -> list[float]:
    """By a complex step in each number."""
    moved = [[complex(x, STEP * (i == j)) for i, x in enumerate(at)] for j in range(len(at))]
    return [complex(loss(m)).imag / STEP for m in moved]


def lesser(a: Number, b: Number) -> Number:
    return a if a.real < b.real else b


def clipped(x: Number, low: float, high: float) -> Number:
    return low if x.real < low else high if x.real > high else x


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: Any) -> None:
    """arXiv 2402.03300 §4.1.2; 2503.20783 without the deviation."""
    everything = [r for group in REWARDS for r in group]
    divisor = {
        "group": lambda group: stdev(group) + 1e-4,
        "batch": lambda group: stdev(everything) + 1e-4,
        "none": lambda group: 1.0,
    }[scale]
    expected = [[(r - mean(group)) / divisor(group) for r in group] for group in REWARDS]
    close(group_advantages(double(REWARDS), scale=scale), expected)


def test_leave_one_out_advantages() -> None:
    """arXiv 2402.14740: the baseline of an answer is the mean of the others'."""
    expected = [
        [r - mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)] for group in REWARDS
    ]
    close(leave_one_out_advantages(double(REWARDS)), expected)
    flat = [x for row in expected for x in row]
    normalized = [[(x - mean(flat)) / (stdev(flat) + 1e-4) for x in row] for row in expected]
    close(leave_one_out_advantages(double(REWARDS), is_normalized=True), normalized)


@pytest.mark.parametrize(
    "advantages",
    [
        lambda r: group_advantages(r),
        lambda r: group_advantages(r, scale="none"),
        lambda r: leave_one_out_advantages(r),
        lambda r: leave_one_out_advantages(r, is_normalized=True),
    ],
)
def test_unscored_answers_count_nowhere(advantages: Callable[[Tensor], Tensor]) -> None:
    scored = advantages(double([[1.0, 0.0, 4.0], [2.0, 0.0, 1.0]]))
    with_gaps = advantages(double([[1.0, NAN, 0.0, 4.0], [2.0, 0.0, NAN, 1.0]]))
    assert with_gaps[0, 1] == 0 and with_gaps[1, 2] == 0
    close(with_gaps[0, [0, 2, 3]], scored[0].tolist())
    close(with_gaps[1, [0, 1, 3]], scored[1].tolist())
    assert (advantages(double([[NAN, NAN], [3.0, NAN]])) == 0).all()


def test_equal_rewards_teach_nothing() -> None:
    equal = double([[0.7] * 4, [0.0, 0.0, 0.0, 1.0]])
    for advantages in (group_advantages(equal), leave_one_out_advantages(equal)):
        assert advantages[0].tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    rewards = double([[1.0, 1.0], [0.0, 1.0], [NAN, NAN], [1.0, NAN], [NAN, -1.0]])
    assert informative_groups(rewards).tolist() == [False, True, False, False, False]


def test_overlong_penalty() -> None:
    """arXiv 2503.14476 eq. 13, with L_max 100 and L_cache 20."""
    tokens = torch.tensor([1, 80, 85, 100, 120])
    found = overlong_penalty(tokens, max_tokens=100, buffer_tokens=20)
    assert found.tolist() == [0, 0, -0.25, -1, -1]


def surrogate(logp: Sequence[Number], form: PolicyForm) -> list[Number]:
    """arXiv 2402.03300 eq. 3 and 4 for each token; 2507.18071 eq. 7 for ratios of answers."""
    logs = [new - old for new, old in zip(logp, OLD, strict=True)]
    if form.ratio_level == "answer":
        sums = [sum(x for x, a in zip(logs, ANSWER, strict=True) if a == i) for i in range(4)]
        logs = [sums[a] / LENGTHS[a] for a in ANSWER]
    losses: list[Number] = []
    for t, log_ratio in enumerate(logs):
        ratio, advantage = cmath.exp(log_ratio), ADVANTAGE[ANSWER[t]]
        kept = clipped(ratio, 1 - form.clip_low, 1 + form.clip_high)
        if form.ratio_cap is not None:
            ratio = clipped(ratio, -math.inf, form.ratio_cap)
        kl = cmath.exp(REF[t] - logp[t]) - (REF[t] - logp[t]) - 1
        losses.append(-lesser(ratio * advantage, kept * advantage) + form.kl_weight * kl)
    return losses


FORMS = {
    "ppo": PolicyForm(),
    "grpo": PolicyForm(kl_weight=0.04),
    "clip higher": PolicyForm(clip_low=0.1, clip_high=0.3),
    "dual clip": PolicyForm(ratio_cap=1.3),
    "gspo": PolicyForm(clip_low=0.02, clip_high=0.03, ratio_level="answer"),
}


@pytest.mark.parametrize("name", FORMS)
def test_policy_losses_are_the_papers(name: str) -> None:
    form, logp = FORMS[name], double(LOGP).requires_grad_()
    answer_T = torch.tensor(ANSWER)
    terms = policy_terms(
        logp, double(OLD), double(ADVANTAGE)[answer_T], form=form,
        ref_logp_T=double(REF), answer_T=answer_T,
    )  # fmt: skip
    close(terms.loss_T, [complex(x).real for x in surrogate(LOGP, form)])
    (found,) = torch.autograd.grad(terms.loss_T.sum(), logp)
    close(found, gradient(lambda moved: sum(surrogate(moved, form)), LOGP))
    # A clipped token moves nothing, and the caller may count them.
    if name == "ppo":
        assert torch.equal(terms.is_clipped_T, found == 0)
    assert not terms.ratio_T.requires_grad


def test_on_policy_the_loss_is_minus_the_advantage_and_kl_zero() -> None:
    logp = torch.tensor(LOGP, requires_grad=True)
    advantage_T = torch.tensor(ADVANTAGE)[torch.tensor(ANSWER)]
    form = PolicyForm(kl_weight=0.1)
    terms = policy_terms(logp, logp.detach(), advantage_T, form=form, ref_logp_T=logp.detach())
    assert (terms.ratio_T == 1).all() and (terms.kl_T == 0).all()
    assert not terms.is_clipped_T.any()
    assert torch.equal(terms.loss_T, -advantage_T)
    (found,) = torch.autograd.grad(terms.loss_T.sum(), logp)
    assert torch.equal(found, -advantage_T)


def test_a_form_that_lacks_its_input_says_so() -> None:
    logp = torch.zeros(2)
    with pytest.raises(TypeError, match="ref_logp_T"):
        policy_terms(logp, logp, logp, form=PolicyForm(kl_weight=0.1))
    with pytest.raises(TypeError, match="answer_T"):
        policy_terms(logp, logp, logp, form=PolicyForm(ratio_level="answer"))
    with pytest.raises(TypeError, match="max_tokens"):
        token_weights(torch.tensor([0]), 1, averaging="constant")


def test_reference_kl_is_never_negative_even_near_zero() -> None:
    near = torch.tensor([-1.0, -1.0 + 1e-4, -1.0 - 1e-4])
    kl = reference_kl(torch.full_like(near, -1.0), near)
    assert kl[0] == 0 and (kl >= 0).all()
    # exp(d) - d - 1 in fp32 has steps of 6e-8 here; d^2 / 2 is 5e-9.
    assert kl[1].item() == pytest.approx(5e-9, rel=0.1)


@pytest.mark.parametrize("averaging", ["answer", "token", "constant"])
def test_token_weights(averaging: Any) -> None:
    losses = [rng.uniform(-1, 1) for _ in ANSWER]
    answers = [[x for x, a in zip(losses, ANSWER, strict=True) if a == i] for i in range(4)]
    expected = {
        "answer": mean(map(mean, answers)),
        "token": mean(losses),
        "constant": sum(map(sum, answers)) / (4 * 32),
    }[averaging]
    weights, divisor = token_weights(
        torch.tensor(ANSWER), 4, averaging=averaging, max_tokens=32, dtype=torch.float64
    )
    close((weights * double(losses)).sum() / divisor, expected)


def test_token_weights_of_micro_batches_add_up() -> None:
    answer_T, losses = torch.tensor(ANSWER), torch.arange(len(ANSWER)) / 7
    for averaging in ("answer", "token", "constant"):
        form: dict[str, Any] = {"averaging": averaging, "max_tokens": 9}
        weights, divisor = token_weights(answer_T, 4, **form)
        parts = [(slice(0, 5), 0), (slice(5, None), 2)]
        halves = [(token_weights(answer_T[part] - first, 2, **form), part) for part, first in parts]
        total = sum((w * losses[part]).sum() for (w, _), part in halves)
        assert sum(d for (_, d), _ in halves) == divisor
        assert total == pytest.approx((weights * losses).sum().item())


def test_engine_weights_are_truncated_and_detached() -> None:
    old = double([-1.0, -1.0, -1.0]).requires_grad_()
    weights = engine_weights(old, double([-1.0, -0.5, -4.0]), cap=2.0)
    close(weights, [1.0, math.exp(-0.5), 2.0])
    assert not weights.requires_grad


MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
STEPS = [[rng.gauss(0, 1) for _ in row] for row in MASK]
VALUES = [[rng.gauss(0, 1) for _ in row] for row in MASK]


def test_generalized_advantages() -> None:
    """arXiv 1506.02438 eq. 16: sum over l of (gamma lambda)^l delta_(t + l)."""
    gamma, lam = 0.97, 0.9
    found, returns = generalized_advantages(
        double(STEPS), double(VALUES), torch.tensor(MASK).bool(), discount=gamma, decay=lam
    )
    for row, mask in enumerate(MASK):
        n = sum(mask)
        value = [*VALUES[row][:n], 0.0]
        deltas = [STEPS[row][t] + gamma * value[t + 1] - value[t] for t in range(n)]
        expected = [sum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:])) for t in range(n)]
        close(found[row], expected + [0.0] * (4 - n))
        sums = [a + v for a, v in zip(expected, value, strict=False)]
        close(returns[row], sums + [0.0] * (4 - n))


def test_with_decay_1_returns_are_sums_of_rewards() -> None:
    everything = torch.ones(3, 4, dtype=torch.bool)
    _, returns = generalized_advantages(double(STEPS), double(VALUES), everything, decay=1.0)
    close(returns, [[sum(row[t:]) for t in range(4)] for row in STEPS])


def test_whitened_advantages() -> None:
    is_token = torch.tensor(MASK).bool()
    values = [v for row, mask in zip(VALUES, MASK, strict=True) for v in row[: sum(mask)]]
    found = whiten(double(VALUES), is_token)
    divisor = math.sqrt(stdev(values) ** 2 + 1e-8)
    close(found[is_token], [(v - mean(values)) / divisor for v in values])
    assert (found[~is_token] == 0).all()
    assert whiten(double([[3.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


def test_token_rewards() -> None:
    """A penalty for leaving the reference at every token, the score at the last."""
    logp, ref = double(VALUES).requires_grad_(), double(STEPS)
    found = token_rewards(
        double([5.0, 6.0, 7.0]), logp, ref, torch.tensor(MASK).bool(), kl_weight=0.1
    )
    for row, mask in enumerate(MASK):
        n = sum(mask)
        expected = [-0.1 * (VALUES[row][t] - STEPS[row][t]) for t in range(n)]
        expected[-1] += [5.0, 6.0, 7.0][row]
        close(found[row], expected + [0.0] * (4 - n))
    assert not found.requires_grad


@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_value_losses(clip: float) -> None:
    values, old, returns = ([rng.gauss(0, 0.5) for _ in range(20)] for _ in range(3))

    def loss(at: Sequence[Number]) -> Number:
        total: Number = 0.0
        for v, o, r in zip(at, old, returns, strict=True):
            kept = clipped(v, o - clip, o + clip)
            total += -lesser(-((v - r) ** 2), -((kept - r) ** 2)) / 2
        return total

    value = double(values).requires_grad_()
    found = value_losses(value, double(old), double(returns), clip=clip).sum()
    close(found, complex(loss(values)).real)
    close(torch.autograd.grad(found, value)[0], gradient(loss, values))


def test_kl_control() -> None:
    """arXiv 1909.08593 §2.2: proportional, and never more than a fifth an error."""
    step = {"target": 6.0, "horizon": 10_000, "num_answers": 500}
    assert next_kl_weight(0.2, 6.0, **step) == 0.2
    assert next_kl_weight(0.2, 6.6, **step) == pytest.approx(0.2 * (1 + 0.1 * 0.05))
    assert next_kl_weight(0.2, 60.0, **step) == pytest.approx(0.2 * (1 + 0.2 * 0.05))
    assert next_kl_weight(0.2, 0.0, **step) == pytest.approx(0.2 * (1 - 0.2 * 0.05))
