"""How likely a model finds answers that are given, and how far it is from another model there.

Shape letters: B sequences of a batch, T tokens of the longest, L tokens of an answer, V vocabulary,
K the likeliest tokens of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.infer.sample import generating

BATCH_TOKENS = 2048
"""Of a batch, padding included: enough rows for the products of a CPU, little memory anywhere."""

LOGITS_BYTES = 64 * 2**20
"""Logits of a batch in fp32, unless one answer alone has more."""

TOP_TOKENS = 64
"""So many tokens of a place are remembered of a model that another one is compared with."""


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """A sequence of tokens and where its answer begins, which is not at 0."""

    ids: tuple[int, ...]
    first: int

    def __post_init__(self) -> None:
        if not 0 < self.first < len(self.ids):
            raise ValueError(f"an answer from {self.first} on in {len(self.ids)} tokens")


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest tokens at every place of an answer, with their log-probabilities."""

    ids_LK: torch.Tensor
    logp_LK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of an answer.

    Args:
        logp_L: log-probability of each of its tokens.
        is_likeliest_L: whether the model itself would have taken that token.
        likeliest: to compare another model with; None if not asked for.
        kl_L: divergence from another model at each place; None if not asked for.
    """

    logp_L: torch.Tensor
    is_likeliest_L: torch.Tensor
    likeliest: Likeliest | None = None
    kl_L: torch.Tensor | None = None


@torch.no_grad()
def read_likelihoods(
    model: Any,
    answers: Sequence[GivenAnswer],
    *,
    remembers: bool = False,
    beside: Sequence[Likeliest] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Likelihood]]:
    """Each answer's number with what the model makes of it; the longest ones come first.

    It ends early if it is stopped.

    Args:
        model: a causal language model, in training or not; it is as before between two answers.
        answers: what is read.
        remembers: also the likeliest tokens at every place.
        beside: what another model has found likeliest, one for each answer.
        is_stopped: asked before each batch.
    """
    size = int(model.get_output_embeddings().weight.shape[0])
    for numbers in _batches(answers, size, is_alone=_has_virtual_tokens(model)):
        if is_stopped():
            return
        with generating(model):
            logits = list(_logits(model, [answers[number] for number in numbers]))
        for number, logits_LV in zip(numbers, logits, strict=True):
            others = None if beside is None else beside[number]
            yield number, _read(logits_LV, answers[number], others, remembers=remembers)


def divergence(likeliest: Likeliest, logp_LV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) at every place, where of p the likeliest tokens are known and the rest as one.

    Joining outcomes can only lose divergence, so this is a lower bound of the exact one; it is 0
    where p and q are the same.

    Args:
        likeliest: of p.
        logp_LV: of q.
    """
    ids_LK = likeliest.ids_LK.to(logp_LV.device).long()
    p_LK = likeliest.logp_LK.to(logp_LV.device).double().exp()
    q_LK = logp_LV.gather(1, ids_LK).double().exp()
    p_LK, q_LK = (torch.cat((each, _rest(each)), dim=1) for each in (p_LK, q_LK))
    return (p_LK * (p_LK.log() - q_LK.log())).nan_to_num(nan=0.0).sum(1).float().cpu()


def _rest(p_LK: torch.Tensor) -> torch.Tensor:
    """What is left of a probability of 1, `rest_L1`; rounding must not make it nothing."""
    return (1 - p_LK.sum(1, keepdim=True)).clamp(min=1e-7)


def _read(
    logits_LV: torch.Tensor, answer: GivenAnswer, others: Likeliest | None, *, remembers: bool
) -> Likelihood:
    logp_LV = logits_LV.float().log_softmax(-1)
    target_L = torch.tensor(answer.ids[answer.first :], device=logp_LV.device)
    likeliest = None
    if remembers:
        top = logp_LV.topk(min(TOP_TOKENS, logp_LV.shape[1]), dim=-1)
        likeliest = Likeliest(top.indices.int().cpu(), top.values.cpu())
    return Likelihood(
        logp_LV.gather(1, target_L[:, None])[:, 0].cpu(),
        (logp_LV.argmax(-1) == target_L).cpu(),
        likeliest,
        None if others is None else divergence(others, logp_LV),
    )


def _batches(
    answers: Sequence[GivenAnswer], num_ids: int, *, is_alone: bool
) -> Iterator[list[int]]:
    """Numbers of answers of like length, the longest first: what does not fit shows at once."""
    order = sorted(range(len(answers)), key=lambda n: (-len(answers[n].ids), n))
    batch, longest, longest_answer = list[int](), 0, 0
    for number in order:
        answer = answers[number]
        num_tokens = max(longest, len(answer.ids)) * (len(batch) + 1)
        num_logits = max(longest_answer, len(answer.ids) - answer.first) * (len(batch) + 1)
        is_full = num_tokens > BATCH_TOKENS or num_logits * num_ids * 4 > LOGITS_BYTES
        if batch and (is_full or is_alone):
            yield batch
            batch, longest, longest_answer = [], 0, 0
        batch.append(number)
        longest = max(longest, len(answer.ids))
        longest_answer = max(longest_answer, len(answer.ids) - answer.first)
    if batch:
        yield batch


def _logits(model: Any, answers: Sequence[GivenAnswer]) -> Iterator[torch.Tensor]:
    """The logits that predict each answer, `logits_LV`.

    Padding stands on the left, so that answers end in one column and only their logits are made.
    """
    longest = max(len(answer.ids) for answer in answers)
    most = max(len(answer.ids) - answer.first for answer in answers)
    pads = [longest - len(answer.ids) for answer in answers]
    ids_BT = torch.tensor([[0] * pad + list(a.ids) for pad, a in zip(pads, answers, strict=True)])
    where: dict[str, Any] = {}
    if any(pads):
        mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        where["attention_mask"] = mask_BT.to(model.device)
        where["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0).to(model.device)
    # As numbers: of a slice, torch 2.13 multiplies each row by a copy of the head (6 s, not 0.3).
    # From the end: PEFT may have put virtual tokens before the first one.
    kept = torch.arange(-most - 1, 0, device=model.device)
    ids_BT = ids_BT.to(model.device)
    out = model(input_ids=ids_BT, use_cache=False, logits_to_keep=kept, **where)
    for row, answer in enumerate(answers):
        length = len(answer.ids) - answer.first
        yield out.logits[row, -length - 1 : -1]


def _has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts learned tokens before the input: it then ignores positions of padding."""
    configs = getattr(model, "peft_config", {})
    return any(getattr(config, "num_virtual_tokens", None) for config in configs.values())
