"""What memory sampling answers takes, between the steps that learn from them."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.config.budget import Needs
from tunesmith.config.objective import ObjectiveConfig
from tunesmith.config.policy import SamplingConfig
from tunesmith.model.memory import Sizes

LOGIT_BYTES = 16
"""Of a token of the vocabulary and an answer: logits in their type and in fp32, divided by the
temperature, and probabilities."""

CACHE_COPIES = 3
"""Keys and values, the longer ones that each token makes of them, and the holes they leave."""

KERNEL_BYTES = {"cpu": 400 << 20}
"""SmolLM2-135M took 510 MB in all for 64 answers of 24 tokens, of which oneDNN's kernels and copies
of weights for some sizes of batch were about 350."""


def needs_with_sampling(
    objective: ObjectiveConfig,
    needs: Needs,
    sizes: Sizes,
    longest_tokens: int,
    *,
    is_bf16: bool,
    device_kind: str,
) -> Needs:
    """What a training needs that samples answers of its own, if its objective does so.

    Args:
        objective: of the recipe.
        needs: of the steps.
        sizes: of the model.
        longest_tokens: of a prompt.
        is_bf16: whether the model computes in bfloat16.
        device_kind: cpu, cuda or mps.
    """
    if not isinstance(objective, SamplingConfig):
        return needs
    answers = objective.num_at_once(device_kind)
    width = 2 if is_bf16 else 4
    tokens = longest_tokens + objective.max_new_tokens
    cache = answers * tokens * sizes.num_layers * 2 * sizes.key_size * width
    logits = answers * sizes.num_embeddings * LOGIT_BYTES
    apart = CACHE_COPIES * cache + logits + KERNEL_BYTES.get(device_kind, 0)
    return replace(needs, apart_bytes=round(apart))
