"""Losses on preferences and from a teacher, as pure functions of log-probabilities and scores.

No model and no batch: what comes in are sums of log-probabilities of whole answers, what goes out
is one loss a pair, answer or row. Means over them are the caller's. All work in the dtype they
get, which should be fp32 or fp64.

Shape letters: P pairs, A rated answers, M mismatched answers, R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

RatedKind = Literal["kto", "apo_zero_unpaired"]
Divergence = Literal["forward", "reverse", "jsd"]

LN_HALF = -0.6931471805599453


@dataclass(frozen=True)
class PairTerms:
    """What a loss gives for each pair.

    `loss_P` is `preference_P + sft_weight * nll_P`. The two parts stand beside it for logging, and
    for a caller that takes its mean of the second over tokens. Rewards are detached.
    """

    loss_P: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor
    preference_P: torch.Tensor
    nll_P: torch.Tensor | None = None


@dataclass(frozen=True)
class RatedTerms:
    """What a loss gives for each rated answer; the reward is detached."""

    loss_A: torch.Tensor
    reward_A: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """One side of the pairs: log-probabilities under policy and reference, and lengths."""

    logp_P: torch.Tensor
    ref_P: torch.Tensor | None
    tokens_P: torch.Tensor | None

    def ratio(self) -> torch.Tensor:
        """Log-ratio to the reference, `ratio_P`; the log-probability itself where there is none."""
        return self.logp_P if self.ref_P is None else self.logp_P - self.ref_P

    def mean_ratio(self) -> torch.Tensor:
        """The log-ratio per token of the answer."""
        return _per_token(self.ratio(), self.tokens_P)

    def mean_logp(self) -> torch.Tensor:
        """The log-probability per token of the answer; the reference does not count."""
        return _per_token(self.logp_P, self.tokens_P)


@dataclass(frozen=True)
class PairForm:
    """The numbers of a preference loss; each kind reads those that `PairKind.settings` names."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0


PairLoss = Callable[[Answers, Answers, PairForm], torch.Tensor]


@dataclass(frozen=True)
class PairKind:
    """One preference loss, and what it needs to know.

    `needs_reference` is false for a loss that never looks at one; any other may also run without,
    as if the reference gave every answer the same probability. `needs_tokens` is true where
    lengths divide. `sft_weight` is the share of the chosen answer's own loss in the paper.
    """

    loss: PairLoss
    paper: str
    settings: tuple[str, ...] = ("beta",)
    needs_reference: bool = True
    needs_tokens: bool = False
    is_reward_per_token: bool = False
    sft_weight: float = 0.0


def pair_terms(
    kind: str,
    chosen_logp_P: torch.Tensor,
    rejected_logp_P: torch.Tensor,
    *,
    chosen_ref_P: torch.Tensor | None = None,
    rejected_ref_P: torch.Tensor | None = None,
    chosen_tokens_P: torch.Tensor | None = None,
    rejected_tokens_P: torch.Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    sft_weight: float | None = None,
) -> PairTerms:
    """The loss named `kind` (a key of PAIR_KINDS) of each pair.

    Args:
        kind: name of the loss.
        chosen_logp_P: summed log-probability of each chosen answer.
        rejected_logp_P: the same of the rejected ones.
        chosen_ref_P: the same under the reference; None, for both, is reference-free.
        rejected_ref_P: see `chosen_ref_P`.
        chosen_tokens_P: lengths, for the kinds that divide by them and for `sft_weight`.
        rejected_tokens_P: see `chosen_tokens_P`.
        beta: strength of the tie to the reference; IPO's tau, ORPO's lambda.
        label_smoothing: how often a label is taken to be flipped, below 0.5.
        margin: SimPO's gamma, in units of reward.
        sft_weight: how much of the chosen answer's mean token loss is added (RPO, arXiv 2404.19733
            eq. 1: alpha); None is what the kind's paper adds. More than 0 needs `chosen_tokens_P`.
    """
    chosen = Answers(chosen_logp_P, chosen_ref_P, chosen_tokens_P)
    rejected = Answers(rejected_logp_P, rejected_ref_P, rejected_tokens_P)
    form, entry = PairForm(beta, label_smoothing, margin), PAIR_KINDS[kind]
    preference_P = entry.loss(chosen, rejected, form)
    weight = entry.sft_weight if sft_weight is None else sft_weight
    nll_P = -chosen.mean_logp() if weight else None
    return PairTerms(
        loss_P=preference_P if nll_P is None else preference_P + weight * nll_P,
        chosen_reward_P=beta * _reward(entry, chosen),
        rejected_reward_P=beta * _reward(entry, rejected),
        preference_P=preference_P,
        nll_P=nll_P,
    )


def _reward(entry: PairKind, side: Answers) -> torch.Tensor:
    if entry.is_reward_per_token:
        return side.mean_logp().detach()
    return (side.ratio() if entry.needs_reference else side.logp_P).detach()


def _per_token(sum_P: torch.Tensor, tokens_P: torch.Tensor | None) -> torch.Tensor:
    if tokens_P is None:
        raise TypeError("this loss divides by the lengths of the answers: tokens are missing")
    return sum_P / tokens_P.to(sum_P.dtype).clamp(min=1)


def _smoothed(logit_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """`-(1 - e) log s(x) - e log s(-x)`, as `e x - log s(x)`: ln 2 exactly at 0 for every e."""
    loss_P = -logsigmoid(logit_P)
    return loss_P + label_smoothing * logit_P if label_smoothing else loss_P


def sigmoid_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """DPO, arXiv 2305.18290 eq. 7: `-log s(beta (ratio_w - ratio_l))`.

    With label smoothing it is the conservative cDPO (ericmitchell.ai/cdpo.pdf).
    """
    return _smoothed(form.beta * (chosen.ratio() - rejected.ratio()), form.label_smoothing)


def sigmoid_norm_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """DPO with each log-ratio divided by its answer's length (Tulu 3, arXiv 2411.15124)."""
    return -logsigmoid(form.beta * (chosen.mean_ratio() - rejected.mean_ratio()))


def robust_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """Robust DPO, arXiv 2403.00409: unbiased where labels are flipped at the rate e.

    `((1 - e) l(x) - e l(-x)) / (1 - 2 e)` with `l = -log s`, which is `l(x) - e x / (1 - 2 e)`.
    """
    logit_P = form.beta * (chosen.ratio() - rejected.ratio())
    rate = form.label_smoothing
    return -logsigmoid(logit_P) - rate / (1 - 2 * rate) * logit_P


def hinge_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """Hinge on the DPO margin (RSO, arXiv 2309.06657): `max(0, 1 - beta delta)`.

    SLiC-HF (arXiv 2305.10425) is this without reference, its delta being 1 / beta and the
    loss beta times as large; its second term is `sft_weight`.
    """
    return torch.relu(1 - form.beta * (chosen.ratio() - rejected.ratio()))


def ipo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """IPO, arXiv 2310.12036 eq. 17: `(h - 1 / (2 tau))^2`, with beta as tau.

    The paper's h is a difference of summed log-ratios; its authors' results, and TRL since, divide
    each by its answer's length, and so does this.
    """
    return (chosen.mean_ratio() - rejected.mean_ratio() - 1 / (2 * form.beta)).square()


def simpo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """SimPO, arXiv 2405.14734 eq. 6: mean log-probabilities, a margin, and no reference."""
    logit_P = form.beta * (chosen.mean_logp() - rejected.mean_logp()) - form.margin
    return _smoothed(logit_P, form.label_smoothing)


def orpo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """ORPO, arXiv 2403.07691 eq. 6 and 7: lambda times the log odds ratio's loss.

    Probabilities are those of the mean log-probability (eq. 3). L_SFT is added with weight 1; it
    counts the answer only, while TRL's counts the prompt too.
    """
    chosen_P, rejected_P = chosen.mean_logp(), rejected.mean_logp()
    log_odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -form.beta * logsigmoid(log_odds_P)


def cpo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """CPO, arXiv 2401.08417 eq. 3: DPO under a uniform reference, plus the chosen answer's loss.

    The paper's L_NLL sums over the answer's tokens; its published code takes their mean, and so
    does this.
    """
    return _smoothed(form.beta * (chosen.logp_P - rejected.logp_P), form.label_smoothing)


def exo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """EXO for pairs, arXiv 2402.00856 eq. 16: reverse KL to the labels (1 - e, e), with e > 0."""
    logit_P = form.beta * (chosen.ratio() - rejected.ratio())
    win_P = logsigmoid(logit_P) - math.log1p(-form.label_smoothing)
    lose_P = logsigmoid(-logit_P) - math.log(form.label_smoothing)
    return torch.sigmoid(logit_P) * win_P + torch.sigmoid(-logit_P) * lose_P


def nca_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """NCA for pairs, arXiv 2402.05369: the chosen answer's own likelihood is kept up, too."""
    chosen_P, rejected_P = form.beta * chosen.ratio(), form.beta * rejected.ratio()
    lowered_P = logsigmoid(-chosen_P) + logsigmoid(-rejected_P)
    return -logsigmoid(chosen_P) - 0.5 * lowered_P


def sppo_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """SPPO with hard labels, arXiv 2405.00675 eq. 4.7: ratios go to +-1 / (2 beta)."""
    target = 0.5 / form.beta
    return (chosen.ratio() - target).square() + (rejected.ratio() + target).square()


def apo_zero_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: for chosen answers better than the model's own."""
    chosen_P, rejected_P = form.beta * chosen.ratio(), form.beta * rejected.ratio()
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def apo_down_loss(chosen: Answers, rejected: Answers, form: PairForm) -> torch.Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: for chosen answers worse than the model's own."""
    chosen_P, rejected_P = form.beta * chosen.ratio(), form.beta * rejected.ratio()
    return torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)


SMOOTHED = ("beta", "label_smoothing")

PAIR_KINDS: dict[str, PairKind] = {
    "sigmoid": PairKind(sigmoid_loss, "2305.18290", SMOOTHED),
    "sigmoid_norm": PairKind(sigmoid_norm_loss, "2411.15124", needs_tokens=True),
    "robust": PairKind(robust_loss, "2403.00409", SMOOTHED),
    "hinge": PairKind(hinge_loss, "2305.10425"),
    "ipo": PairKind(ipo_loss, "2310.12036", needs_tokens=True),
    "simpo": PairKind(
        simpo_loss, "2405.14734", (*SMOOTHED, "margin"),
        needs_reference=False, needs_tokens=True, is_reward_per_token=True,
    ),
    "orpo": PairKind(
        orpo_loss, "2403.07691", needs_reference=False, needs_tokens=True,
        is_reward_per_token=True, sft_weight=1.0,
    ),
    "cpo": PairKind(
        cpo_loss, "2401.08417", SMOOTHED, needs_reference=False, needs_tokens=True, sft_weight=1.0
    ),
    "exo": PairKind(exo_loss, "2402.00856", SMOOTHED),
    "nca": PairKind(nca_loss, "2402.05369"),
    "sppo": PairKind(sppo_loss, "2405.00675"),
    "apo_zero": PairKind(apo_zero_loss, "2408.06266"),
    "apo_down": PairKind(apo_down_loss, "2408.06266"),
}  # fmt: skip
"""Preference losses by their recipe names."""


def kto_kl(logp_M: torch.Tensor, ref_M: torch.Tensor) -> torch.Tensor:
    """KTO's reference point z0 (arXiv 2402.01306 §4.1): the mean log-ratio, at least 0, detached.

    The answers are mismatched: each stands after another example's prompt of the same batch. With
    several ranks, the mean over all of them comes before the bound; then this is the wrong place.
    """
    return (logp_M - ref_M).detach().mean().clamp(min=0)


def kto_terms(
    logp_A: torch.Tensor,
    ref_A: torch.Tensor,
    is_good_A: torch.Tensor,
    *,
    kl: torch.Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kind: RatedKind = "kto",
) -> RatedTerms:
    """Losses of rated answers: KTO, arXiv 2402.01306 eq. 8, without its constant.

    A good answer costs `w_D (1 - s(beta (ratio - kl)))`, a bad one `w_U (1 - s(beta (kl -
    ratio)))`. `apo_zero_unpaired` (arXiv 2408.06266) is the same with `kl` 0. The paper keeps
    `w_D n_D / (w_U n_U)` between 1 and 4/3, n being the numbers of good and bad answers.
    """
    ratio_A = logp_A - ref_A
    shift = kl if kind == "kto" else 0.0
    good_A = is_good_A.to(ratio_A.dtype)
    weight_A = desirable_weight * good_A + undesirable_weight * (1 - good_A)
    loss_A = weight_A * torch.sigmoid((1 - 2 * good_A) * beta * (ratio_A - shift))
    return RatedTerms(loss_A=loss_A, reward_A=beta * ratio_A.detach())


def reward_terms(
    chosen_score_P: torch.Tensor,
    rejected_score_P: torch.Tensor,
    margin_P: torch.Tensor | None = None,
    center: float = 0.0,
) -> PairTerms:
    """Bradley-Terry loss of a reward model, `-log s(r_w - r_l - margin)` (arXiv 2307.09288 eq. 2).

    `center` times `(r_w + r_l)^2` is added, which keeps the scores around 0 (arXiv 2312.09244).
    """
    delta_P = chosen_score_P - rejected_score_P
    preference_P = -logsigmoid(delta_P if margin_P is None else delta_P - margin_P)
    pull_P = center * (chosen_score_P + rejected_score_P).square()
    return PairTerms(
        loss_P=preference_P + pull_P if center else preference_P,
        chosen_reward_P=chosen_score_P.detach(),
        rejected_reward_P=rejected_score_P.detach(),
        preference_P=preference_P,
    )


def kl_rows(
    student_logits_RV: torch.Tensor,
    teacher_logits_RV: torch.Tensor,
    kind: Divergence = "forward",
    *,
    temperature: float = 1.0,
    teacher_share: float = 0.5,
) -> torch.Tensor:
    """Divergence of each row's distributions, `loss_R` (GKD, arXiv 2306.13649 §2).

    forward is KL(teacher || student), reverse is KL(student || teacher), jsd is eq. 1, with
    `teacher_share` (its beta, between 0 and 1) as the teacher's share of the mixture. Gradients are
    not multiplied by the squared temperature, unlike in Hinton's distillation. Logits must be
    finite.
    """
    student_RV = torch.log_softmax(student_logits_RV / temperature, dim=-1)
    teacher_RV = torch.log_softmax(teacher_logits_RV / temperature, dim=-1)
    if kind == "forward":
        return _kl(teacher_RV, student_RV)
    if kind == "reverse":
        return _kl(student_RV, teacher_RV)
    # In logarithms: where both are below the smallest fp32, their sum's would be -inf, and 0 * inf.
    mixture_RV = torch.logaddexp(
        student_RV + math.log1p(-teacher_share), teacher_RV + math.log(teacher_share)
    )
    of_teacher_R, of_student_R = _kl(teacher_RV, mixture_RV), _kl(student_RV, mixture_RV)
    return teacher_share * of_teacher_R + (1 - teacher_share) * of_student_R


def _kl(p_RV: torch.Tensor, q_RV: torch.Tensor) -> torch.Tensor:
    return (p_RV.exp() * (p_RV - q_RV)).sum(-1)


def _log1mexp(x_P: torch.Tensor) -> torch.Tensor:
    """`log(1 - exp(x))` for x <= 0, in the form that is accurate on each side of -ln 2.

    An x nearer to 0 than the dtype resolves around 1 counts as that far away, without a gradient:
    a model that is sure of an answer must not send NaN back.
    """
    x_P = x_P.clamp(max=-torch.finfo(x_P.dtype).eps)
    # Each branch sees only its own side: the gradient of the other would be 0 * inf.
    near_P, far_P = x_P.clamp(min=LN_HALF), x_P.clamp(max=LN_HALF)
    near_loss_P, far_loss_P = torch.log(-torch.expm1(near_P)), torch.log1p(-torch.exp(far_P))
    return torch.where(x_P < LN_HALF, far_loss_P, near_loss_P)
