"""Does the exported model answer as the trained one? Logits and prompts, side by side.

Both models read the same tokens in float32 where memory allows, so that what differs is the
weights alone. Differences are told in standard deviations of the logits, which does not depend on
how a model scales them.

Shape letters: T tokens of a sample, V vocabulary (or scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.errors import ExportError

MAX_SAMPLES = 8
MAX_TOKENS = 128
"""Of a sample: the logits of 8 such samples take 600 MB with 150,000 tokens."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an export may be from what was trained.

    Args:
        difference: largest of the logits, in standard deviations of all.
        divergence: mean Kullback-Leibler divergence of the next token's probabilities, in nats.
    """

    difference: float
    divergence: float


TOLERANCES = {
    "float32": Tolerance(0.02, 1e-5),
    "float16": Tolerance(0.05, 1e-4),
    "bfloat16": Tolerance(0.5, 0.002),
    "q8_0": Tolerance(1.5, 0.03),
    "int8": Tolerance(2.0, 0.1),
    "fp8": Tolerance(3.0, 0.3),
    "5 bits": Tolerance(8.0, 1.0),
    "4 bits": Tolerance(8.0, 1.0),
    "quantized base": Tolerance(12.0, 2.0),
}
"""By format; about four times what SmolLM2-135M shows, whose size makes it sensitive
(docs/export.md has the figures)."""

LOSSY = ("q8_0", "int8", "fp8", "5 bits", "4 bits")
"""What is rounded so far that training may be lost in it: these are compared with the base, too."""


MUCH = 0.2
"""Of what training changed; more of it lost is worth a word."""


@dataclass(frozen=True)
class Sample:
    """Tokens to compare logits on."""

    where: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A conversation and the tokens that training made of it."""

    messages: tuple[Mapping[str, Any], ...]
    ids: tuple[int, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """How two models differ.

    Args:
        tokens: positions compared.
        max_difference: largest of the logits.
        deviations: the same in standard deviations of the logits.
        divergence: mean Kullback-Leibler divergence, trained from exported, in nats.
        agreement: share of positions with the same likeliest token.
        first: the first position whose likeliest token differs: sample, position, both tokens.
    """

    tokens: int
    max_difference: float
    deviations: float
    divergence: float
    agreement: float
    first: tuple[int, int, int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """For export.json."""
        return {
            "tokens": self.tokens,
            "max_difference": round(self.max_difference, 6),
            "max_difference_in_deviations": round(self.deviations, 6),
            "mean_divergence_nats": round(self.divergence, 8),
            "top_1_agreement": round(self.agreement, 6),
        }

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.max_difference:.4g} ({self.deviations:.2g} standard "
            f"deviations), {self.divergence:.2g} nats on average; "
            f"{self.agreement:.1%} of {self.tokens:,} likeliest tokens are the same"
        )


@torch.no_grad()
def logits_of(model: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """The logits `[T, V]` of every sample (scores: `[1, C]`), in float32 on the CPU."""
    found: list[torch.Tensor] = []
    for sample in samples:
        ids_1T = torch.tensor([sample.ids], device=model.device)
        out = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))
        found.append(out.logits[0].float().cpu().reshape(-1, out.logits.shape[-1]))
    return found


def compare(trained: Sequence[torch.Tensor], exported: Sequence[torch.Tensor]) -> Figures:
    """How far logits are apart, over the tokens that both know."""
    largest = divergence = spread = 0.0
    first: tuple[int, int, int, int] | None = None
    total = same = 0
    for number, (left_TV, right_TV) in enumerate(zip(trained, exported, strict=True)):
        width = min(left_TV.shape[-1], right_TV.shape[-1])
        left_TV, right_TV = left_TV[:, :width], right_TV[:, :width]
        gap = float((left_TV - right_TV).abs().max())
        largest = max(largest, gap) if gap == gap else math.inf  # NaN is no number at all
        spread += float(left_TV.std(correction=0)) / len(trained)
        divergence += float(_divergence_T(left_TV, right_TV).sum())
        is_same_T = left_TV.argmax(-1) == right_TV.argmax(-1)
        total, same = total + len(is_same_T), same + int(is_same_T.sum())
        if first is None and not bool(is_same_T.all()):
            place = int((~is_same_T).nonzero()[0])
            first = (number, place, int(left_TV[place].argmax()), int(right_TV[place].argmax()))
    count = max(total, 1)
    deviations = largest / max(spread, 1e-6)
    return Figures(total, largest, deviations, divergence / count, same / count, first)


def _divergence_T(left_TV: torch.Tensor, right_TV: torch.Tensor) -> torch.Tensor:
    """Sum of p (ln p - ln q); a score alone has no probabilities, and no divergence."""
    left_TV, right_TV = left_TV.log_softmax(-1), right_TV.log_softmax(-1)
    return (left_TV.exp() * (left_TV - right_TV)).sum(-1).clamp(min=0)


def check_logits(
    figures: Figures, tolerance: Tolerance, samples: Sequence[Sample], tokenizer: Any, where: str
) -> None:
    """Raises ExportError (`export.differs`) for a difference beyond the tolerance."""
    is_near = figures.deviations <= tolerance.difference
    if is_near and figures.divergence <= tolerance.divergence:
        return
    found = str(figures)
    if figures.first is not None:
        number, place, was, now = figures.first
        names = (repr(str(tokenizer.decode([token]))) for token in (was, now))
        found += f"; first at {samples[number].where}, token {place + 1}: " + " became ".join(names)
    raise ExportError(
        "export.differs",
        where,
        found=found,
        expected=f"at most {tolerance.difference:g} standard deviations, and "
        f"{tolerance.divergence:g} nats on average",
        try_="nothing was left there; --no-verify writes it all the same, to look at",
    )


def check_kept(figures: Figures, base: Figures, where: str) -> str:
    """Makes sure that an export is nearer to what was trained than the base is; says how near.

    Small changes may be rounded away: weights that lie on a grid fall back to where they were.

    Raises:
        ExportError: what was trained is lost (`export.training-lost`).
    """
    if figures.divergence >= base.divergence:
        raise ExportError(
            "export.training-lost",
            where,
            found=f"an export that is {figures.divergence:.2g} nats from what was trained; "
            f"the untrained base is {base.divergence:.2g}",
            expected="one that is nearer than the base",
            try_="more bits, such as q8_0",
        )
    said = f"training moved the model by {base.divergence:.2g} nats, this format moves it by "
    said += f"{figures.divergence:.2g}"
    if figures.divergence > MUCH * base.divergence:
        said += ": much of what was trained is lost; take more bits, such as q8_0"
    return said


def check_prompts(prompts: Sequence[Prompt], given: Sequence[Sequence[int]], where: str) -> None:
    """Compares prompts as the export's own template renders them with those of training.

    Raises:
        ExportError: the first that differs (`export.prompt-differs`).
    """
    for prompt, ids in zip(prompts, given, strict=True):
        if tuple(ids) == prompt.ids:
            continue
        pairs = zip(prompt.ids, ids, strict=False)
        place = next(
            (n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(prompt.ids))
        )
        raise ExportError(
            "export.prompt-differs",
            where,
            found=f"the prompt of {prompt.where}: token {place + 1} is "
            f"{_shown(ids, place)}, {len(ids)} in all",
            expected=f"{_shown(prompt.ids, place)}, {len(prompt.ids)} in all, as in training",
        )


def _shown(ids: Sequence[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "the end"


def prompt_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **arguments: Any
) -> list[int]:
    """A conversation as its template renders it, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **arguments
    )
    return tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
