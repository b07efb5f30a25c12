"""Chat templates by name, for base models whose tokenizer has none."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).with_name("named")


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """What is known of a named template; its Jinja text is read when it is asked for.

    Args:
        name: as in the recipe.
        description: one line.
        tokens: special tokens that the tokenizer must have.
        end: what ends an answer; `eos` is the tokenizer's own EOS token.
        system: where a system message goes: a message of its own, folded into the next user
            message, or plain text.
        shows_tools: whether tool schemas, calls and results have a form of their own.
        writes_bos: whether the text starts as the format does. Otherwise `{{ bos_token }}` belongs
            in front for tokenizers that start plain text with it.
        source: where the format is published, in words.
    """

    name: str
    description: str
    tokens: tuple[str, ...]
    end: str
    system: Literal["own", "folded", "text"]
    shows_tools: bool
    writes_bos: bool
    source: str

    @property
    def path(self) -> Path:
        """Its Jinja file."""
        return FOLDER / f"{self.name}.jinja"

    def read(self) -> str:
        """Its Jinja text."""
        return self.path.read_text(encoding="utf-8")


@functools.cache
def _load() -> dict[str, NamedTemplate]:
    text = (FOLDER / "templates.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.safe_load(text)
    for row in rows.values():
        row["tokens"] = tuple(row["tokens"])
    return {name: NamedTemplate(name=name, **row) for name, row in rows.items()}


class _Named(Mapping[str, NamedTemplate]):
    """The table, read from its file when it is first looked at."""

    def __getitem__(self, name: str) -> NamedTemplate:
        return _load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_load())

    def __len__(self) -> int:
        return len(_load())


NAMED: Mapping[str, NamedTemplate] = _Named()
"""All named templates, in the order of the documentation."""


def missing_tokens(name: str, tokenizer_vocabulary: Collection[str]) -> list[str]:
    """The special tokens of a named template that a tokenizer lacks.

    Without them the marks of the format would be cut into ordinary tokens, which no base model
    has seen in that use.
    """
    return [token for token in NAMED[name].tokens if token not in tokenizer_vocabulary]


def template_files() -> list[Path]:
    """The Jinja files of all named templates."""
    return [template.path for template in NAMED.values()]
