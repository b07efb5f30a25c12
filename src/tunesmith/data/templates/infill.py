"""Fill-in-the-middle (arXiv 2207.14255, prefix-suffix-middle): texts cut in three, middle last."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

from tunesmith.errors import RecipeError


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The tokens in front of a text's start, its end, and its middle."""

    prefix: str
    suffix: str
    middle: str


KNOWN = (
    InfillTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    InfillTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    InfillTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    InfillTokens("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    InfillTokens("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)


def find_infill_tokens(tokens: Collection[str]) -> InfillTokens:
    """The fill-in-the-middle tokens among a tokenizer's added tokens.

    Raises:
        RecipeError: it has none (`recipe.infill`).
    """
    for known in KNOWN:
        if known.prefix in tokens and known.suffix in tokens and known.middle in tokens:
            return known
    raise RecipeError(
        "recipe.infill",
        "data.fill_in_middle",
        found="a tokenizer without fill-in-the-middle tokens",
        expected="one that has them, e.g. <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>",
        try_="leave data.fill_in_middle out, or take a model for code",
    )


def as_infill(text: str, share: float, tokens: InfillTokens) -> str:
    """The text as a fill-in-the-middle task in a `share` of cases, chosen by its own hash.

    The two cuts are uniform over characters, as in the paper's section 3.1.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=24).digest()
    lot, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if lot >= share * 2**64:
        return text
    low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    start, middle, end = text[:low], text[low:high], text[high:]
    return f"{tokens.prefix}{start}{tokens.suffix}{end}{tokens.middle}{middle}"
