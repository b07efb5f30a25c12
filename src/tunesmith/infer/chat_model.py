"""Loads anything one can talk to: a run directory, an adapter, a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from tunesmith.config.load import recipe_from
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.errors import ModelError
from tunesmith.model.device import find_device
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    load_model,
    load_tokenizer,
)
from tunesmith.model.load_adapter import base_of, find_adapter, load_adapter
from tunesmith.model.vocabulary import make_room
from tunesmith.types import Reporter, Tokenizer


@dataclass(frozen=True)
class ChatModel:
    """A model ready to generate, with its tokenizer."""

    model: Any
    tokenizer: Tokenizer
    label: str
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Variables that the run gave the chat template, e.g. enable_thinking."""

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's EOS and the model's own list."""
        return stop_ids(self.model, self.tokenizer)


def stop_ids(model: Any, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the model's own list."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


def open_chat_model(target: str, reporter: Reporter) -> ChatModel:
    """Loads a run directory, an adapter folder, a model folder, a GGUF file, or a hub id.

    Weights keep the number format of their files, so that answers equal those of a plain
    transformers script. Only the base of a run with `model.quantize` is quantized again, as it was
    in training; its adapter folder alone (`model/`) goes on the plain base.

    Raises:
        ModelError: there is nothing to load (`model.*`); a run that has no result yet
            (`model.unfinished-run`).
    """
    path, recipe = find_result(target)
    with reporter.waiting(f"Loading {target}"):
        chat = _open(path, target, reporter, recipe.model if recipe else None)
    if recipe is not None:
        chat = replace(chat, template_arguments=recipe.data.template_arguments)
    return chat


def find_result(target: str) -> tuple[Path, Recipe | None]:
    """The result of a run directory with the run's recipe; what else is named, as it is.

    Raises:
        ModelError: the run has no result yet (`model.unfinished-run`).
    """
    path = Path(target).expanduser()
    recipe_file, recipe = path / "recipe.resolved.yaml", None
    if recipe_file.exists():
        path = path / "model"
        if not path.is_dir():
            raise ModelError(
                "model.unfinished-run",
                target,
                found="a run without a model/ folder: it has not finished",
                expected="a finished run",
                try_="run the same `tunesmith train` again to finish it, or name a folder under "
                f"{path.parent / 'checkpoints'}",
            )
        recipe = recipe_from(yaml.safe_load(recipe_file.read_text(encoding="utf-8")))
    return path, recipe


def _open(
    path: Path, target: str, reporter: Reporter, trained: ModelConfig | None = None
) -> ChatModel:
    if (path / "adapter_config.json").exists():
        return _open_adapter(path, target, reporter, trained)
    source = find_model(ModelConfig(id=str(path) if path.exists() else target), reporter)
    adapter = find_adapter(source)
    if adapter is not None:
        return _open_adapter(adapter, target, reporter, trained)
    check_weights_exist(source)
    model = load_model(source)
    return _ready(model, load_tokenizer(source), target)


def _open_adapter(
    path: Path, label: str, reporter: Reporter, trained: ModelConfig | None
) -> ChatModel:
    base = find_model(base_of(path, label), reporter)
    check_weights_exist(base)
    how: dict[str, str] = {}
    if trained is not None and trained.quantize != "none":
        # The same bits again: those of bfloat16 weights differ from those of float32 ones.
        how = {"quantize": trained.quantize, "dtype": trained.dtype}
    has_tokenizer = (path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(ModelSource(label, str(path)) if has_tokenizer else base)
    model = load_model(base, **how)
    make_room(model, len(tokenizer.get_vocab()))
    return _ready(load_adapter(model, path, label), tokenizer, label)


def _ready(model: Any, tokenizer: Tokenizer, label: str) -> ChatModel:
    device: torch.device = find_device().torch_device
    return ChatModel(model.to(device).eval(), tokenizer, label)
