"""A tokenizer as GGUF files hold it: tokens, their kinds, merges or scores, and special ids.

llama.cpp knows a byte-level tokenizer's way of cutting texts by a name alone. The name is found by
comparing the tokenizer's own patterns with those that the names stand for, not by a hash of what it
makes of a text: so a tokenizer that was extended or saved anew is known, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError
from tunesmith.export.trained import Trained

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in GGUF."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_HEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN_UPPER, _TEKKEN_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    f"{_TEKKEN_HEAD}{_TEKKEN_UPPER}*{_TEKKEN_LOWER}+|{_TEKKEN_HEAD}{_TEKKEN_UPPER}+"
    rf"{_TEKKEN_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What texts are cut by -> llama.cpp's name for it. "digits" and "words" are steps of the
# tokenizers library without a pattern of their own.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Args:
        model: gpt2 for byte-level tokens with merges, llama for SentencePiece's.
        pre: how texts are cut first; None for SentencePiece.
        tokens: by id.
        kinds: by id.
        merges: pairs in their order, a space between; of byte-level tokens.
        scores: by id, of SentencePiece's.
        adds_space: whether a space is put before a text.
    """

    model: str
    pre: str | None
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    adds_space: bool = False


def vocabulary_of(trained: Trained, num_rows: int) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to the rows of the embedding.

    Raises:
        UserError: llama.cpp has no such tokenizer (`export.gguf-tokenizer`).
    """
    tree: dict[str, Any] = json.loads(trained.tokenizer.backend_tokenizer.to_str())
    model = tree["model"]
    if model.get("type") != "BPE":
        raise _unknown(trained, f"a tokenizer of the kind {model.get('type')}")
    texts = {int(number): str(text) for text, number in model["vocab"].items()}
    added = {int(each["id"]): each for each in tree.get("added_tokens", ())}
    texts |= {number: each["content"] for number, each in added.items()}
    if max(texts) >= num_rows:
        raise _unknown(trained, f"{max(texts) + 1} tokens for {num_rows} rows")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    is_spm = bool(model.get("byte_fallback"))
    kinds = [UNUSED] * num_rows
    for number, text in texts.items():
        kinds[number] = _kind(text, added.get(number), model.get("unk_token"), is_spm=is_spm)
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(num_rows)]
    if not is_spm:
        pre = _pre_tokenizer(trained, tree, has_merges=bool(merges))
        pairs = tuple(f"{left} {right}" for left, right in merges)
        return Vocabulary("gpt2", pre, tuple(tokens), tuple(kinds), pairs)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    # SentencePiece joins the pair whose result scores highest: the merge that came first.
    scores = tuple(-float(ranks.get(token, len(merges))) for token in tokens)
    plain = tuple(
        text.replace("▁", " ") if kind == USER_DEFINED else text
        for text, kind in zip(tokens, kinds, strict=True)
    )
    return Vocabulary("llama", None, plain, tuple(kinds), (), scores, _adds_space(tree))


def _kind(text: str, added: dict[str, Any] | None, unknown: str | None, *, is_spm: bool) -> int:
    if is_spm and text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    if is_spm and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTE
    return NORMAL


def _pre_tokenizer(trained: Trained, tree: dict[str, Any], *, has_merges: bool) -> str:
    steps = tuple(_steps(tree.get("pre_tokenizer")))
    name = PRE_TOKENIZERS.get(steps)
    if name is not None:
        return name
    if not steps and not has_merges:  # every byte is a token, wherever texts are cut
        return "gpt-2"
    raise _unknown(trained, f"texts cut by {' then '.join(steps) or 'nothing'}")


def _steps(part: Any) -> list[str]:
    """What a pre-tokenizer cuts by, step by step."""
    if part is None:
        return []
    match part.get("type"):
        case "Sequence":
            return [step for each in part["pretokenizers"] for step in _steps(each)]
        case "Split":
            pattern = part["pattern"]
            text = pattern.get("Regex") or re.escape(pattern.get("String", ""))
            # Some files have the line breaks themselves where others have their escapes.
            return [text.replace("\n", r"\n").replace("\r", r"\r")]
        case "Digits":
            return ["digits" if part.get("individual_digits") else "runs of digits"]
        case "ByteLevel":
            return ["words"] if part.get("use_regex", True) else []
        case kind:
            return [str(kind)]


def _adds_space(tree: dict[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer puts a space before texts."""
    text = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])
    has_scheme = '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    return '"type": "Prepend"' in text or has_scheme or '"add_prefix_space": true' in text


def write_vocabulary(writer: Any, vocabulary: Vocabulary, trained: Trained, template: str) -> None:
    """Writes the tokenizer's keys.

    Args:
        writer: of the gguf package.
        vocabulary: of the tokenizer.
        trained: with the tokens that end an answer.
        template: the chat template; empty for none.
    """
    tokenizer = trained.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    named = (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (_end_of_turn(trained.stop_ids), writer.add_eot_token_id),
    )
    for number, add in named:
        if number is not None:
            add(int(number))
    writer.add_add_bos_token(starts_with_bos(trained))
    if template:
        writer.add_chat_template(template)


def _end_of_turn(stop_ids: Sequence[int]) -> int | None:
    """What ends an answer besides the tokenizer's own end, which comes first."""
    return stop_ids[-1] if len(stop_ids) > 1 else None


def starts_with_bos(trained: Trained) -> bool:
    """Whether what the model reads starts with the BOS token: prompts, if there is a template.

    llama.cpp puts it before every text if its file says so, and takes it out of the template's.
    """
    tokenizer = trained.tokenizer
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer.chat_template:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}],
                tokenize=False,
                add_generation_prompt=True,
                **trained.template_arguments,
            )
        )
        return text.startswith(str(tokenizer.bos_token)) and _means_start(tokenizer)
    ids = tokenizer.backend_tokenizer.encode_batch(["a"], add_special_tokens=True)[0].ids
    return ids[:1] == [tokenizer.bos_token_id]


def _means_start(tokenizer: Any) -> bool:
    """Whether the BOS token stands for nothing else: SmolLM2's also begins every message."""
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )
    )
    return text.count(str(tokenizer.bos_token)) == 1


def _unknown(trained: Trained, found: str) -> UserError:
    names = ", ".join(dict.fromkeys(PRE_TOKENIZERS.values()))
    return UserError(
        "export.gguf-tokenizer",
        trained.label,
        found=found,
        expected=f"one that llama.cpp has: byte-level BPE ({names}), or SentencePiece's BPE",
    )
