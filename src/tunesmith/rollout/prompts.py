"""Prompts of the token store: what stands before a sample's last answer, and that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.loader import Loader
from tunesmith.types import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Args:
        sample: its number in the store.
        ids: token ids, up to where the answer begins.
        text: the same as text, with special tokens.
        reference: the data's own answer; empty if it has none.
    """

    sample: int
    ids: tuple[int, ...]
    text: str
    reference: str


def spoken(text: str) -> str:
    """An answer without the thinking before it, which some templates add empty to every row."""
    return text.rpartition("</think>")[2].strip()


def prompts_of(loader: Loader, samples: Sequence[int], tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of some samples of a loader's store."""
    return [_prompt_of(loader, sample, tokenizer) for sample in samples]


def _prompt_of(loader: Loader, sample: int, tokenizer: Tokenizer) -> Prompt:
    # Templates that change earlier turns split a conversation: its last sequence has all of it.
    last = list(loader.store.sequences_of(sample))[-1]
    sequence = loader.store.sequence(last, (0, loader.store.length(last)))
    first, count, _ = sequence.runs[-1]
    ids = tuple(sequence.ids[:first].tolist())
    answer = sequence.ids[first : first + count].tolist()
    return Prompt(
        sample,
        ids,
        str(tokenizer.decode(ids, skip_special_tokens=False)),
        spoken(str(tokenizer.decode(answer, skip_special_tokens=True))),
    )
