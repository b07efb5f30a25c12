"""Texts that end answers, and answers as text: across the borders of tokens and of characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.types import Tokenizer

UNFINISHED = "\ufffd"
"""What decoding writes for the first bytes of a character whose others are not there yet."""

SPARE_TOKENS = 8
"""Looked at besides those of a stop text: the first may be a character's last bytes, or special."""


def plain_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options))


@dataclass(frozen=True)
class StopTexts:
    """Finds stop texts in answers.

    Args:
        tokenizer: of the model.
        texts: any of them ends an answer.
    """

    tokenizer: Tokenizer
    texts: tuple[str, ...]

    def have_come(self, ids: Sequence[int]) -> bool:
        """Whether the last token has completed one; earlier ones are known to have not.

        Only the end is decoded: a token is at least a byte of the text, special ones aside.
        """
        if not self.texts:
            return False
        most = max(len(text.encode()) for text in self.texts) + SPARE_TOKENS
        tail = plain_text(self.tokenizer, ids[-most:])
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """The text up to the first of them."""
        return text[: min((text.find(stop) for stop in self.texts if stop in text), default=None)]

    def answer(self, ids: Sequence[int]) -> str:
        """An answer's text; a character that was cut in two at its end is left out."""
        return self.cut(plain_text(self.tokenizer, ids).rstrip(UNFINISHED))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; special ones are spelled out.

    Of a character of several tokens the last one has it, the others have nothing.
    """
    found: list[str] = []
    start, said = 0, ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
        is_whole = not text.endswith(UNFINISHED)
        found.append(text[len(said) :] if is_whole else "")
        said = text if is_whole else said
        # A few tokens of context keep the spaces that some tokenizers take from a text's start.
        if is_whole and end - start > 2 * SPARE_TOKENS:
            start = end - SPARE_TOKENS
            said = str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))
    return found
