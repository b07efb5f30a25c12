"""Every preference loss against its paper's equation, pair by pair, in Python numbers.

The references run on complex numbers: a step of ih gives f(x + ih).imag / h, the derivative to the
last bit, so one equation proves the loss and its gradient, both to 1e-12.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.objectives.preference_losses import (
    PAIR_KINDS,
    PairTerms,
    kl_rows,
    kto_kl,
    kto_terms,
    pair_terms,
    reward_terms,
)

STEP = 1e-30
Number = complex | float

rng = random.Random(7)
PAIRS = [
    SimpleNamespace(
        w=rng.uniform(-40, -3), l=rng.uniform(-40, -3), rw=rng.uniform(-40, -3),
        rl=rng.uniform(-40, -3), nw=rng.randint(1, 20), nl=rng.randint(1, 20),
    )
    for _ in range(7)
]  # fmt: skip
SETTINGS = {"beta": 0.15, "label_smoothing": 0.1, "margin": 0.4}
ROW = {"chosen": ("w", "rw", "nw"), "rejected": ("l", "rl", "nl")}


def log_sigmoid(x: Number) -> Number:
    return -cmath.log(1 + cmath.exp(-x))


def sigmoid(x: Number) -> Number:
    return 1 / (1 + cmath.exp(-x))


def smoothed(x: Number, rate: float) -> Number:
    return -(1 - rate) * log_sigmoid(x) - rate * log_sigmoid(-x)


def hinge(x: Number) -> Number:
    return x if x.real > 0 else 0.0


def log_odds(mean_logp: Number) -> Number:
    p = cmath.exp(mean_logp)
    return cmath.log(p / (1 - p))


def delta(p: Any) -> Number:
    return (p.w - p.rw) - (p.l - p.rl)


def nca(p: Any, b: float) -> Number:
    chosen, rejected = b * (p.w - p.rw), b * (p.l - p.rl)
    return -log_sigmoid(chosen) - log_sigmoid(-chosen) / 2 - log_sigmoid(-rejected) / 2


def orpo(p: Any, b: float) -> Number:
    odds_ratio = log_odds(p.w / p.nw) - log_odds(p.l / p.nl)
    return -p.w / p.nw - b * log_sigmoid(odds_ratio)


def robust(x: Number, e: float) -> Number:
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def ipo(p: Any, tau: float) -> Number:
    return ((p.w - p.rw) / p.nw - (p.l - p.rl) / p.nl - 1 / (2 * tau)) ** 2


def sppo(p: Any, b: float) -> Number:
    return (p.w - p.rw - 1 / (2 * b)) ** 2 + (p.l - p.rl + 1 / (2 * b)) ** 2


# Each takes a pair p, beta b, smoothing e and margin g: what stands in the paper.
REFERENCES: dict[str, Callable[[Any, float, float, float], Number]] = {
    "sigmoid": lambda p, b, e, g: smoothed(b * delta(p), e),
    "sigmoid_norm": lambda p, b, e, g: (
        -log_sigmoid(b / p.nw * (p.w - p.rw) - b / p.nl * (p.l - p.rl))
    ),
    "robust": lambda p, b, e, g: robust(b * delta(p), e),
    "hinge": lambda p, b, e, g: hinge(1 - b * delta(p)),
    "ipo": lambda p, b, e, g: ipo(p, b),
    "simpo": lambda p, b, e, g: smoothed(b / p.nw * p.w - b / p.nl * p.l - g, e),
    "orpo": lambda p, b, e, g: orpo(p, b),
    "cpo": lambda p, b, e, g: smoothed(b * p.w - b * p.l, e) - p.w / p.nw,
    "exo": lambda p, b, e, g: reverse_kl(sigmoid(b * delta(p)), 1 - e),
    "nca": lambda p, b, e, g: nca(p, b),
    "sppo": lambda p, b, e, g: sppo(p, b),
    "apo_zero": lambda p, b, e, g: 1 - sigmoid(b * (p.w - p.rw)) + sigmoid(b * (p.l - p.rl)),
    "apo_down": lambda p, b, e, g: sigmoid(b * (p.w - p.rw)) + 1 - sigmoid(b * delta(p)),
}


def reverse_kl(q: Number, p: float) -> Number:
    return q * cmath.log(q / p) + (1 - q) * cmath.log((1 - q) / (1 - p))


def derivative(f: Callable[[Any], Number], p: Any, name: str) -> float:
    """df / d p.name, by the complex step."""
    moved = SimpleNamespace(**{**vars(p), name: complex(getattr(p, name), STEP)})
    return complex(f(moved)).imag / STEP


def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([getattr(p, name) for p in PAIRS], dtype=dtype)


def ours(kind: str, *, has_reference: bool = True, **settings: Any) -> tuple[PairTerms, Any]:
    """The terms of PAIRS, and the leaves w and l."""
    leaves = [column(name).requires_grad_() for name in "wl"]
    given: dict[str, Any] = {}
    for side, (_, ref, tokens) in ROW.items():
        given[f"{side}_tokens_P"] = column(tokens, torch.int64)
        if has_reference:
            given[f"{side}_ref_P"] = column(ref)
    return pair_terms(kind, *leaves, **given, **settings), leaves


def check(terms: PairTerms, leaves: Any, reference: Callable[[Any], Number], pairs: Any) -> None:
    expected = [complex(reference(p)).real for p in pairs]
    close(terms.loss_P, expected)
    for leaf, name in zip(leaves, "wl", strict=True):
        (gradient,) = torch.autograd.grad(terms.loss_P.sum(), leaf, retain_graph=True)
        close(gradient, [derivative(reference, p, name) for p in pairs])


def close(found: Tensor, expected: Sequence[float]) -> None:
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(list(expected), rel=1e-12, abs=1e-12)


def test_every_kind_has_a_reference() -> None:
    assert set(REFERENCES) == set(PAIR_KINDS)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_loss_and_gradient_are_the_papers(kind: str) -> None:
    terms, leaves = ours(kind, **SETTINGS)
    numbers = tuple(SETTINGS.values())
    check(terms, leaves, lambda p: REFERENCES[kind](p, *numbers), PAIRS)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_a_kind_reads_the_settings_it_names_and_no_others(kind: str) -> None:
    losses = ours(kind, **SETTINGS)[0].loss_P
    for name, value in SETTINGS.items():
        changed = ours(kind, **{**SETTINGS, name: value * 1.5})[0].loss_P
        assert torch.equal(changed, losses) == (name not in PAIR_KINDS[kind].settings)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_a_kind_reads_the_reference_if_it_says_so(kind: str) -> None:
    with_it, without = ours(kind, **SETTINGS)[0], ours(kind, has_reference=False, **SETTINGS)[0]
    assert torch.equal(with_it.loss_P, without.loss_P) != PAIR_KINDS[kind].needs_reference


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_without_reference_is_a_uniform_reference(kind: str) -> None:
    terms, leaves = ours(kind, has_reference=False, **SETTINGS)
    uniform = [SimpleNamespace(**{**vars(p), "rw": 0.0, "rl": 0.0}) for p in PAIRS]
    numbers = tuple(SETTINGS.values())
    check(terms, leaves, lambda p: REFERENCES[kind](p, *numbers), uniform)


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_a_kind_needs_lengths_if_it_says_so(kind: str) -> None:
    logps = torch.tensor([-3.0]), torch.tensor([-4.0])
    if PAIR_KINDS[kind].needs_tokens:
        with pytest.raises(TypeError, match="lengths"):
            pair_terms(kind, *logps)
    else:
        assert pair_terms(kind, *logps, label_smoothing=0.1).loss_P.isfinite().all()


def test_rpo_adds_the_chosen_answers_mean_loss() -> None:
    """arXiv 2404.19733 eq. 1."""
    terms, leaves = ours("sigmoid", beta=0.2, sft_weight=0.7)
    check(terms, leaves, lambda p: smoothed(0.2 * delta(p), 0.0) - 0.7 * p.w / p.nw, PAIRS)
    assert terms.nll_P is not None
    close(terms.nll_P, [-p.w / p.nw for p in PAIRS])
    assert torch.equal(terms.loss_P, terms.preference_P + 0.7 * terms.nll_P)


def test_slic_is_hinge_without_reference() -> None:
    """arXiv 2305.10425: max(0, d - w + l) + its regularizer, with d = 1 / beta."""
    terms, _ = ours("hinge", has_reference=False, beta=0.2)
    close(terms.loss_P / 0.2, [max(0.0, 5.0 - p.w + p.l) for p in PAIRS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", [1, 3, 64])
@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_first_loss_is_ln_2_exactly(
    kind: str, rate: float, pairs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    chosen, rejected = (-100 * torch.rand(2, pairs, dtype=dtype)).requires_grad_().unbind()
    terms = pair_terms(
        kind, chosen, rejected, chosen_ref_P=chosen.detach(), rejected_ref_P=rejected.detach(),
        label_smoothing=rate,
    )  # fmt: skip
    assert (terms.loss_P == torch.tensor(math.log(2), dtype=dtype)).all()
    assert (terms.chosen_reward_P - terms.rejected_reward_P == 0).all()
    assert terms.loss_P.mean().item() == torch.tensor(math.log(2), dtype=dtype).item()


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_rewards(kind: str) -> None:
    terms, _ = ours(kind, **SETTINGS)
    by_kind = {"simpo": lambda p: p.w / p.nw, "orpo": lambda p: p.w / p.nw, "cpo": lambda p: p.w}
    reward = by_kind.get(kind, lambda p: p.w - p.rw)
    close(terms.chosen_reward_P, [SETTINGS["beta"] * reward(p) for p in PAIRS])
    assert not terms.chosen_reward_P.requires_grad and not terms.rejected_reward_P.requires_grad


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize("logps", [(-1e4, -1.0), (-1.0, -1e4), (0.0, 0.0), (-1e-9, -2.0)])
def test_extreme_pairs_stay_finite(kind: str, logps: tuple[float, float]) -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in logps)
    tokens = torch.tensor([3])
    terms = pair_terms(
        kind, chosen, rejected, chosen_tokens_P=tokens, rejected_tokens_P=tokens, **SETTINGS
    )
    gradients = torch.autograd.grad(terms.loss_P.sum(), (chosen, rejected), allow_unused=True)
    for found in (terms.loss_P, *gradients):
        assert found is not None and found.isfinite().all()


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_the_papers(kind: Any) -> None:
    answers = [(p.w, p.rw, i % 3 > 0) for i, p in enumerate(PAIRS)]
    kl = 0.8 if kind == "kto" else 0.0

    def reference(logp: Number, ref: float, is_good: bool) -> Number:
        """lambda_y - v(x, y)."""
        if is_good:
            return 1.2 - 1.2 * sigmoid(0.3 * (logp - ref - kl))
        return 0.9 - 0.9 * sigmoid(0.3 * (kl - (logp - ref)))

    logp = column("w").requires_grad_()
    terms = kto_terms(
        logp, column("rw"), torch.tensor([good for *_, good in answers]), kl=0.8, beta=0.3,
        desirable_weight=1.2, undesirable_weight=0.9, kind=kind,
    )  # fmt: skip
    close(terms.loss_A, [complex(reference(*a)).real for a in answers])
    (gradient,) = torch.autograd.grad(terms.loss_A.sum(), logp)
    steps = [complex(reference(complex(w, STEP), rw, good)).imag / STEP for w, rw, good in answers]
    close(gradient, steps)
    close(terms.reward_A, [0.3 * (w - rw) for w, rw, _ in answers])


def test_ktos_reference_point_is_a_mean_and_never_negative() -> None:
    logp = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
    kl = kto_kl(logp, torch.tensor([-4.0, -6.5], dtype=torch.float64))
    assert kl.item() == 1.25
    assert not kl.requires_grad
    assert kto_kl(logp, torch.zeros(2, dtype=torch.float64)).item() == 0.0


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("has_margin", [False, True])
def test_reward_model(center: float, has_margin: bool) -> None:
    margin = [0.1 * i * has_margin for i in range(len(PAIRS))]
    rows = [SimpleNamespace(w=p.w / 9, l=p.l / 9, m=m) for p, m in zip(PAIRS, margin, strict=True)]
    leaves = [torch.tensor([getattr(r, n) for r in rows], dtype=torch.float64) for n in "wl"]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    margin_P = torch.tensor(margin, dtype=torch.float64) if has_margin else None
    terms = reward_terms(*leaves, margin_P, center)
    check(terms, leaves, lambda r: -log_sigmoid(r.w - r.l - r.m) + center * (r.w + r.l) ** 2, rows)
    assert torch.equal(terms.chosen_reward_P, leaves[0])


def softmax(logits: Sequence[Number], temperature: float) -> list[Number]:
    powers = [cmath.exp(x / temperature) for x in logits]
    return [x / sum(powers) for x in powers]


def kl(p: Sequence[Number], q: Sequence[Number]) -> Number:
    return sum(a * cmath.log(a / b) for a, b in zip(p, q, strict=True))


def divergence(student: Sequence[Number], teacher: Sequence[float], kind: str) -> Number:
    s, t = softmax(student, 1.7), softmax(teacher, 1.7)
    if kind != "jsd":
        return kl(t, s) if kind == "forward" else kl(s, t)
    mixture = [0.3 * b + 0.7 * a for a, b in zip(s, t, strict=True)]
    return 0.3 * kl(t, mixture) + 0.7 * kl(s, mixture)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_are_the_papers(kind: Any) -> None:
    rows = [[[rng.gauss(0, 2) for _ in range(6)] for _ in range(4)] for _ in range(2)]
    student = torch.tensor(rows[0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(rows[1], dtype=torch.float64)
    loss_R = kl_rows(student, teacher, kind, temperature=1.7, teacher_share=0.3)
    close(loss_R, [complex(divergence(s, t, kind)).real for s, t in zip(*rows, strict=True)])
    (gradient,) = torch.autograd.grad(loss_R.sum(), student)
    for i, (s, t) in enumerate(zip(*rows, strict=True)):
        moved = [[complex(x, STEP * (j == k)) for k, x in enumerate(s)] for j in range(6)]
        close(gradient[i], [complex(divergence(m, t, kind)).imag / STEP for m in moved])


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_of_equals_and_of_far_logits(kind: Any) -> None:
    logits = torch.tensor([[0.0, 3.0, -300.0], [1.0, 1.0, 1.0]])
    assert kl_rows(logits, logits, kind).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    student = logits.roll(1, dims=1).requires_grad_()
    loss = kl_rows(student, logits, kind).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()
