"""What tunesmith needs of a tokenizer: data and model never see each other; they meet here."""

from __future__ import annotations

from typing import Any, Protocol


class Encoding(Protocol):
    """Token ids of one text with the character range each came from."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class BackendTokenizer(Protocol):
    """The `tokenizers` object inside a fast tokenizer."""

    encode_special_tokens: bool
    model: Any

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """Encodes many texts on all cores."""
        ...

    def encode_batch_fast(self, input: list[str], *, add_special_tokens: bool) -> list[Any]:
        """The same without offsets."""
        ...

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        ...

    def from_str(self, json: str) -> BackendTokenizer:
        """Another tokenizer, from JSON."""
        ...

    def no_truncation(self) -> None:
        """Stops cutting texts off."""
        ...

    def no_padding(self) -> None:
        """Stops filling texts up."""
        ...

    def to_str(self) -> str:
        """The whole tokenizer as JSON."""
        ...


class Tokenizer(Protocol):
    """What tunesmith needs of a transformers tokenizer."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any
    special_tokens_map: Any
    bos_token: Any

    @property
    def backend_tokenizer(self) -> BackendTokenizer:
        """The fast tokenizer underneath."""
        ...

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Renders messages through the chat template."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids by token text, added tokens included."""
        ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of token texts."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Token texts of ids."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Text of ids."""
        ...
