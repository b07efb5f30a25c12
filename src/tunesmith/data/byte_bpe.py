"""Byte-level BPE by tiktoken, three times as fast as `tokenizers`, where it is proved to be equal.

Both cut text into words by one regular expression and merge the bytes of each word. They differ in
what they merge: `tokenizers` the pairs of its list, in the list's order; tiktoken any pair whose
bytes are a token, the lowest token first. The two are the same if

1. a later merge makes a higher token, so that the orders agree, and
2. merging the bytes of every single token gives that token back. For suppose tiktoken merged x and
   y to a token t by a pair that the list lacks, at a moment until which both did the same. No merge
   reached over the edges of t by then, so `tokenizers`, given t alone, does the same merges,
   arrives at x and y, and stops there: it would not give t back.

Where `tokenizers` looks whole words up before it merges (`ignore_merges`), as tiktoken always does,
it is enough instead of 2 that its list has every pair whose bytes are a token.

All this is checked for the tokenizer at hand. What cannot be proved (the tables of letters behind
the regular expressions) is tested on all of Unicode (tests/data/test_byte_bpe.py), and samples of
every data set are encoded both ways (`outlines.py`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from tunesmith.types import BackendTokenizer

SEPARATOR = "\ufdd0|\ufdd0"
"""Stands between texts that are encoded in one call; the noncharacters are in no text."""

Ids = npt.NDArray[np.int32]


class ByteBpe:
    """Encodes texts without special tokens in them."""

    def __init__(self, encoding: tiktoken.Encoding, separator: int, *, is_nfc: bool) -> None:
        self.encoding = encoding
        self.separator = separator
        self.is_nfc = is_nfc

    def can_encode(self, text: str) -> bool:
        """Whether a text has no noncharacters and needs no normalization."""
        if text.isascii():
            return True
        return "\ufdd0" not in text and (not self.is_nfc or unicodedata.is_normalized("NFC", text))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text; one call for all, so that threads seldom wait for each other."""
        if not texts:
            return []
        joined = SEPARATOR.join(texts)
        ids = self.encoding.encode_to_numpy(joined, allowed_special={SEPARATOR})
        ids = ids.astype(np.int32)
        stops = np.flatnonzero(ids == self.separator).tolist()
        starts = [0, *(stop + 1 for stop in stops)]
        return [ids[start:stop] for start, stop in zip(starts, [*stops, len(ids)], strict=True)]


def find_byte_bpe(backend: BackendTokenizer, tree: dict[str, Any]) -> ByteBpe | None:
    """The fast twin of a tokenizer; None where there is none that is proved to be equal.

    Args:
        backend: the tokenizer.
        tree: what it is made of, the JSON of `to_str`.
    """
    model, pattern = tree["model"], _pattern(tree)
    normalizer = tree.get("normalizer")
    is_nfc = normalizer == {"type": "NFC"}
    if pattern is None or not (is_nfc or normalizer is None) or not _is_plain_bpe(model):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    if not _orders_agree(model["merges"], vocabulary):
        return None
    if not _merges_alike(backend, model):
        return None
    ranks = {bytes(map(BYTES.__getitem__, token)): rank for token, rank in vocabulary.items()}
    separator = 1 + max([*vocabulary.values(), *(t["id"] for t in tree["added_tokens"])])
    encoding = tiktoken.Encoding(
        "tunesmith",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={SEPARATOR: separator},
    )
    return ByteBpe(encoding, separator, is_nfc=is_nfc)


def _pattern(tree: dict[str, Any]) -> str | None:
    """The one regular expression that cuts words, if that is all that happens before merging."""
    outer = tree.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = outer.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, to_bytes = steps
    is_plain = (
        split["behavior"] == "Isolated"
        and not split["invert"]
        and not to_bytes["add_prefix_space"]
        and not to_bytes["use_regex"]
    )
    return split["pattern"].get("Regex") if is_plain else None


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in unusual)
        and not model.get("byte_fallback")
        and all(char in BYTES for token in model["vocab"] for char in token)
        and all(char in model["vocab"] for char in BYTES)
    )


def _orders_agree(merges: list[Any], vocabulary: dict[str, int]) -> bool:
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in merges)
    made = np.array([vocabulary["".join(pair)] for pair in pairs], dtype=np.int64)
    return bool((np.diff(made) >= 0).all())


def _merges_alike(backend: BackendTokenizer, model: dict[str, Any]) -> bool:
    """Whether tiktoken's freedom in choosing pairs makes no difference."""
    vocabulary = model["vocab"]
    if not model.get("ignore_merges"):
        merge = backend.model.tokenize
        return all(len(merge(token)) == 1 for token in vocabulary)
    listed = {tuple(pair) if isinstance(pair, list) else pair for pair in model["merges"]}
    is_spaced = not isinstance(model["merges"][0], list)
    return all(
        (f"{token[:cut]} {token[cut:]}" if is_spaced else (token[:cut], token[cut:])) in listed
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the rest follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_alphabet()
