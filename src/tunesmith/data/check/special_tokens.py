"""Special tokens written inside text, this tokenizer's own and those of other models."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Final, NamedTuple

# Spellings that mark turns, ends and fill-in-the-middle in well-known models.
_SPELLINGS: Final = (
    # ChatML (Qwen, Yi, many others), GPT-2 to gpt-oss, Phi
    "<|im_start|> <|im_end|> <|im_sep|> <|endoftext|> <|startoftext|> <|endofprompt|> <|start|> "
    "<|end|> <|message|> <|channel|> <|return|> <|call|> <|constrain|> "
    "<|system|> <|user|> <|assistant|> <|observation|> <|pad|> <|padding|> "
    # Llama 2, Mistral, Llama 3, Llama 4
    "<s> </s> [INST] [/INST] <<SYS>> <</SYS>> [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] "
    "[TOOL_RESULTS] [/TOOL_RESULTS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] "
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> "
    "<|python_tag|> <|finetune_right_pad_id|> <|header_start|> <|header_end|> <|eot|> <|eom|> "
    # Gemma, ChatGLM, InternLM, Baichuan, Command R
    "<bos> <eos> <start_of_turn> <end_of_turn> [gMASK] <sop> <eop> <eoh> <eoa> "
    "<reserved_102> <reserved_103> <reserved_106> <reserved_107> <|START_OF_TURN_TOKEN|> "
    "<|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> "
    # DeepSeek, with full-width bars and a low line that is U+2581
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜▁pad▁｜> <|EOT|> "
    "<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> "
    "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
    # fill in the middle and code, vision
    "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <fim_prefix> <fim_middle> "
    "<fim_suffix> <fim_pad> <|repo_name|> <|file_sep|> <PRE> <SUF> <MID> <EOT> "
    "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <|image|> <image_soft_token> "
    # BERT, T5, RWKV and older tokenizers
    "[CLS] [SEP] [MASK] [PAD] [UNK] <pad> <unk> <mask> <extra_id_0> <|rwkv_tokenizer_end_of_text|>"
)
WELL_KNOWN: Final = frozenset(_SPELLINGS.split())


class SpecialTokensFound(NamedTuple):
    """Special tokens that stand in a text, each once, in the order of the text."""

    own: list[str]
    foreign: list[str]


def find_special_tokens(text: str, tokens: Collection[str]) -> SpecialTokensFound:
    """The special tokens written in `text`: `tokens` are own, other well-known ones foreign.

    Own ones would end a turn if they were encoded as tokens; foreign ones tell that the text
    was already rendered with another model's template.

    Not caught: spellings of other models that are not in the list, other letter case, spaces
    inside a token, and templates made of plain words (### Instruction:, Human:). Common words of
    other formats that look the same are reported, as the HTML tag <s>.

    Args:
        text: The text to search.
        tokens: The special tokens of the tokenizer in use. One regular expression is compiled for
            each set of tokens and kept.
    """
    own_tokens = tokens if isinstance(tokens, frozenset) else frozenset(tokens)
    pieces = list(dict.fromkeys(_pattern(own_tokens).findall(text)))
    return SpecialTokensFound(
        own=[piece for piece in pieces if piece in own_tokens],
        foreign=[piece for piece in pieces if piece not in own_tokens],
    )


@lru_cache(maxsize=8)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted((tokens | WELL_KNOWN) - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))
