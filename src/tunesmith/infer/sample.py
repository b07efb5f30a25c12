"""Several answers to each of many prompts at once, with the log-probability of every token.

A prompt is read once for all of its answers, and the batch shrinks as answers end. Every token has
a uniform number of its own that it is drawn with, so how the work is split changes no more than
rounding does.

Shape letters: P prompts, K answers of each, L new tokens at most, B answers under way, T tokens of
the longest prompt, V vocabulary, N blocks of it, R tokens
of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn.

    Args:
        stop_ids: tokens that end an answer; the one that does is part of it.
        max_tokens: of an answer.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest only; None among all.
        top_p: draw among the likeliest that together have this probability.
    """

    stop_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sampled answer.

    Args:
        ids: its tokens, the one that ended it included.
        logp: their log-probabilities at the temperature, among all tokens of the vocabulary.
        is_complete: whether it ended by itself.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    is_complete: bool


@torch.no_grad()
def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniform_PKL: torch.Tensor,
    drawing: Drawing,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[Drawn]] | None:
    """K answers to each prompt, by plain transformers' forward and key/value cache.

    Args:
        model: a causal language model, in training or not; it is as before afterwards.
        prompts: token ids.
        uniform_PKL: numbers in [0, 1), one for each token to be drawn.
        drawing: how.
        is_stopped: asked before each token.

    Returns:
        the answers to each prompt; None if it was stopped.
    """
    with generating(model):
        answers = _begin(model, prompts, uniform_PKL.shape[1])
        while answers.are_under_way:
            if is_stopped():
                return None
            answers.draw(uniform_PKL.flatten(0, 1), drawing)
            if answers.are_under_way:
                answers.shrink()
                answers.advance(model)
    drawn = [
        Drawn(tuple(ids), tuple(logp), ids[-1] in drawing.stop_ids)
        for ids, logp in zip(answers.ids, answers.logp, strict=True)
    ]
    each = uniform_PKL.shape[1]
    return [drawn[first : first + each] for first in range(0, len(drawn), each)]


def draw_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, drawing: Drawing
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row, and its log-probability at the temperature: `id_B`, `logp_B`.

    By inversion: the first token whose cumulated probability exceeds the uniform number.
    """
    if drawing.temperature <= 0:
        id_B1 = logits_BV.argmax(-1, keepdim=True)
        return id_B1[:, 0], logits_BV.float().log_softmax(-1).gather(1, id_B1)[:, 0]
    p_BV = (logits_BV.float() / drawing.temperature).softmax(-1)
    is_cut = drawing.top_p < 1 or drawing.top_k is not None
    id_B1 = _invert(_allowed(p_BV, drawing) if is_cut else p_BV, uniform_B[:, None])
    return id_B1[:, 0], p_BV.gather(1, id_B1)[:, 0].log()


BLOCK_TOKENS = 256
"""Sums are built over blocks of the vocabulary first: summing up all of it in double precision took
twice as long as the head (49,152 tokens, a CPU)."""


def _invert(p_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """The tokens at some shares of the cumulated probabilities, `id_B1`; these need no sum of 1."""
    if p_BV.device.type == "mps":  # knows no double precision
        return _invert(p_BV.cpu(), uniform_B1.cpu()).to(p_BV.device)
    missing = -p_BV.shape[1] % BLOCK_TOKENS
    p_BNR = torch.nn.functional.pad(p_BV, (0, missing)).unflatten(1, (-1, BLOCK_TOKENS))
    # Double precision: in single, the sum over 150,000 tokens may end at 0.9999.
    end_BN = p_BNR.sum(-1).double().cumsum(-1)
    point_B1 = uniform_B1.to(end_BN) * end_BN[:, -1:]
    block_B1 = _first_above(end_BN, point_B1)
    inside_BR = p_BNR.take_along_dim(block_B1[..., None], 1)[:, 0].double()
    start_B1 = torch.nn.functional.pad(end_BN, (1, 0)).gather(1, block_B1)
    # The block's own sum, rounded, may end below the point.
    place_B1 = _first_above(inside_BR.cumsum(-1) + start_B1, point_B1, inside_BR > 0)
    return block_B1 * BLOCK_TOKENS + place_B1


def _first_above(
    sum_BR: torch.Tensor, point_B1: torch.Tensor, is_possible_BR: torch.Tensor | None = None
) -> torch.Tensor:
    """The first place of each row whose sum is above the point, else the last possible one."""
    place_B1 = torch.searchsorted(sum_BR, point_B1, right=True)
    if is_possible_BR is None:
        return place_B1.clamp(max=sum_BR.shape[1] - 1)
    numbers_R = torch.arange(sum_BR.shape[1], device=sum_BR.device)
    last_B1 = torch.where(is_possible_BR, numbers_R, 0).amax(1, keepdim=True)
    return torch.minimum(place_B1, last_B1)


def _allowed(p_BV: torch.Tensor, drawing: Drawing) -> torch.Tensor:
    """Probabilities with those that may not be drawn at 0."""
    if drawing.top_k is not None and drawing.top_k < p_BV.shape[-1]:
        least_B1 = p_BV.topk(drawing.top_k, dim=-1).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < least_B1, 0.0)
    if drawing.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        # The token that reaches the sum still belongs to it, so one is always left.
        is_over_BV = before_BV >= drawing.top_p * sorted_BV.sum(-1, keepdim=True)
        is_out_BV = torch.zeros_like(is_over_BV).scatter(1, order_BV, is_over_BV)
        p_BV = p_BV.masked_fill(is_out_BV, 0.0)
    return p_BV


LEAST_ROWS = 8
"""A smaller batch takes as long as this one."""

PAD_TOKENS = 32
"""Prompts are padded to a multiple of it: oneDNN makes its kernels anew for every number of rows,
and 24 tokens of 96 answers took 160 s where every answer that ended made the batch smaller, 7 s
once the kernels were there."""


@dataclass
class _Answers:
    """Answers being drawn.

    Args:
        rows: numbers of the answers in the batch; some of them have ended.
        cache: keys and values of these.
        mask_BT: 1 where these have a token.
        logits_BV: of the next tokens.
        ids: of all answers.
        logp: of all answers.
        has_ended: of all answers.
        last_B: the token that each in the batch ends with.
        num_drawn: tokens of an answer that goes on.
    """

    rows: list[int]
    cache: Any
    mask_BT: torch.Tensor
    logits_BV: torch.Tensor
    ids: list[list[int]]
    logp: list[list[float]]
    has_ended: list[bool]
    last_B: torch.Tensor
    num_drawn: int = 0

    @property
    def are_under_way(self) -> bool:
        """Whether any is to go on."""
        return not all(self.has_ended)

    def draw(self, uniform_AL: torch.Tensor, drawing: Drawing) -> None:
        """Draws a token of each that goes on."""
        uniform_B = uniform_AL[self.rows, self.num_drawn]
        id_B, logp_B = draw_tokens(self.logits_BV, uniform_B, drawing)
        for row, token, logp in zip(self.rows, id_B.tolist(), logp_B.tolist(), strict=True):
            if not self.has_ended[row]:
                self.ids[row].append(token)
                self.logp[row].append(logp)
                is_full = len(self.ids[row]) == drawing.max_tokens
                self.has_ended[row] = is_full or token in drawing.stop_ids
        self.num_drawn, self.last_B = self.num_drawn + 1, id_B

    def shrink(self) -> None:
        """Halves the batch, as often as those that go on fit into half of it."""
        going_on = [place for place, row in enumerate(self.rows) if not self.has_ended[row]]
        size = len(self.rows)
        while size // 2 >= max(len(going_on), LEAST_ROWS):
            size //= 2
        if size == len(self.rows):
            return
        ended = [place for place, row in enumerate(self.rows) if self.has_ended[row]]
        kept = sorted(going_on + ended[: size - len(going_on)])
        places = torch.tensor(kept, device=self.mask_BT.device)
        self.rows = [self.rows[place] for place in kept]
        self.mask_BT, self.last_B = self.mask_BT[places], self.last_B[places]
        self.cache.batch_select_indices(places)

    def advance(self, model: Any) -> None:
        """Reads the tokens just drawn."""
        self.mask_BT = torch.cat((self.mask_BT, self.mask_BT.new_ones(len(self.rows), 1)), dim=1)
        out = model(
            input_ids=self.last_B[:, None],
            attention_mask=self.mask_BT,
            position_ids=self.mask_BT.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache, self.logits_BV = out.past_key_values, out.logits[:, -1]


def _begin(model: Any, prompts: Sequence[Sequence[int]], num_answers: int) -> _Answers:
    """Reads the prompts, padded on the left so that all end in one column."""
    device, longest = model.device, -(-max(map(len, prompts)) // PAD_TOKENS) * PAD_TOKENS
    ids_PT = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask_PT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    ids_PT, mask_PT = ids_PT.to(device), mask_PT.to(device)
    out = model(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=(mask_PT.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    out.past_key_values.batch_repeat_interleave(num_answers)
    count = len(prompts) * num_answers
    return _Answers(
        rows=list(range(count)),
        cache=out.past_key_values,
        mask_BT=mask_PT.repeat_interleave(num_answers, 0),
        logits_BV=out.logits[:, -1].repeat_interleave(num_answers, 0),
        ids=[[] for _ in range(count)],
        logp=[[] for _ in range(count)],
        has_ended=[False] * count,
        last_B=ids_PT[:, -1].repeat_interleave(num_answers, 0),
    )


@contextmanager
def generating(model: Any) -> Generator[None]:
    """The model in eval mode, with an attention that knows padding and caches."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training, attention = model.training, base.config._attn_implementation
    model.eval()
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        model.train(was_training)
