"""What is exported: base, adapter, tokenizer and what of the run belongs to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.model.heads import Head
from tunesmith.model.load import ModelSource
from tunesmith.types import Json


@dataclass(frozen=True)
class Trained:
    """A model as a run left it, its weights still in their files.

    Args:
        label: what the user calls it.
        base: the files of the weights; of a model that was trained whole, its own.
        adapter: the folder of the adapter that goes on them, if there is one.
        tokenizer: of transformers, with the chat template.
        head: of a reward model or a classifier.
        stop_ids: tokens that end an answer.
        template_arguments: variables that training gave the chat template.
        quantize: how the base was quantized while it was trained, or none.
        run: the run's directory, if it is one.
        base_name: what the user calls the base.
    """

    label: str
    base: ModelSource
    adapter: Path | None
    tokenizer: Any
    head: Head | None = None
    stop_ids: tuple[int, ...] = ()
    template_arguments: Mapping[str, Json] = field(default_factory=dict[str, Json])
    quantize: str = "none"
    run: Path | None = None
    base_name: str = ""


def with_defaults(template: str, arguments: Mapping[str, Json]) -> str:
    """A chat template whose variables have the values of training unless they are given.

    Whoever renders it without arguments then gets what was trained, `enable_thinking` above all.
    The form of these lines is the one that DeepSeek's templates have, so every renderer knows it.
    """
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in arguments.items()
        if name.isidentifier()
    ]
    return "".join(lines) + template


def _literal(value: Json) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)
