"""A plain model folder: weights with the adapter in them, settings, tokenizer with its template."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import UserError
from tunesmith.export.merged_sum import (
    AdaptedWeights,
    NotPlainError,
    folder_of_whole_model,
    not_mergeable,
)
from tunesmith.export.trained import Trained, with_defaults
from tunesmith.export.weights import Facts, FileWeights, Weights, weights_of_folder, write_shards
from tunesmith.io.atomic import format_bytes, require_space
from tunesmith.io.safeload import (
    PROMPT_KINDS,
    adapter_settings,
    read_settings,
    weight_files,
    without_code,
)
from tunesmith.model.heads import Head
from tunesmith.model.load import fetched, load_config, model_class
from tunesmith.types import Reporter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergedModel:
    """A model without an adapter, its weights not read yet.

    Args:
        weights: what its files will hold.
        settings: its config.json.
        generation: its generation_config.json.
        config: transformers' configuration of these settings.
        notes: what is worth saying.
    """

    weights: Weights
    settings: dict[str, Any]
    generation: dict[str, Any]
    config: Any
    notes: tuple[str, ...] = ()


@contextmanager
def open_merged(trained: Trained, reporter: Reporter) -> Generator[MergedModel]:
    """Yields what was trained as one model.

    Raises:
        UserError: its adapter cannot be merged (`export.not-mergeable`), or the base's files hold
            quantized weights (`export.quantized-base`).
        ModelError: the files cannot be read.
    """
    folder = fetched(trained.base, "model.unreadable", "a language model", with_weights=True)
    settings = without_code(read_settings(folder / "config.json"))
    _refuse_quantized(trained, settings)
    config = load_config(trained.base)
    base = FileWeights(weight_files(folder, trained.label))
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as temporary:
        weights, notes = _sum(trained, base, config, Path(temporary), reporter)
        _write_vocabulary(settings, weights)
        is_untied = isinstance(weights, AdaptedWeights) and not weights.is_tied
        if is_untied:
            _set(settings, "tie_word_embeddings", value=False)
        if trained.head is not None:
            settings.update(_head_settings(trained.head, config))
        file = folder / "generation_config.json"
        generation = without_code(read_settings(file)) if file.exists() else {}
        generation["eos_token_id"] = _one_or_many(trained.stop_ids)
        _set(settings, "eos_token_id", value=_one_or_many(trained.stop_ids))
        yield MergedModel(weights, settings, generation, config, notes)


def _sum(
    trained: Trained, base: FileWeights, config: Any, temporary: Path, reporter: Reporter
) -> tuple[Weights, tuple[str, ...]]:
    if trained.adapter is None:
        return base, ()
    kind = str(adapter_settings(trained.adapter, trained.label)["peft_type"])
    if kind in PROMPT_KINDS:
        raise not_mergeable(trained, kind, "its virtual tokens are no weights of the model")
    is_tied = bool(config.get_text_config().tie_word_embeddings)
    try:
        return AdaptedWeights(base, trained, is_tied=is_tied), ()
    except NotPlainError as reason:
        size = sum(facts.num_bytes(torch.float32) for facts in base.facts.values())
        note = f"{reason}: merged by PEFT with the whole model in memory ({format_bytes(size)})"
        require_space(temporary, size)
        with reporter.waiting("Merging the whole model"):
            folder_of_whole_model(trained, temporary)
    return weights_of_folder(temporary), (note,)


def write_merged(
    trained: Trained, folder: Path, *, dtype: str, max_bytes: int, reporter: Reporter
) -> tuple[str, ...]:
    """Writes a folder that transformers, vLLM and others load; gives what is worth saying.

    Args:
        trained: what is written.
        folder: an existing one.
        dtype: a name of `DTYPES`, or auto for each weight's own.
        max_bytes: of a file of weights.
        reporter: shows the tensors going by.

    Raises:
        UserError: see `open_merged`.
        DiskError: there is no room (`disk.full`).
    """
    with open_merged(trained, reporter) as merged:
        dtype_of = partial(_dtype, wanted=DTYPES.get(dtype))
        facts = merged.weights.facts
        require_space(folder, sum(each.num_bytes(dtype_of(each)) for each in facts.values()))

        def track(names: Iterable[str]) -> Iterable[str]:
            return reporter.track("Merging weights", names, total=len(facts))

        write_shards(merged.weights, folder, dtype_of=dtype_of, max_bytes=max_bytes, track=track)
        kinds = [dtype_of(each) for each in facts.values() if each.dtype.is_floating_point]
        name = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
        write_settings(merged, folder, name)
    write_tokenizer(trained, folder)
    return merged.notes


def write_settings(merged: MergedModel, folder: Path, dtype: str) -> None:
    """Writes config.json and generation_config.json."""
    # Versions of transformers below 5 and other programs know the older of the two keys alone.
    key = "torch_dtype" if "torch_dtype" in merged.settings else "dtype"
    values = {**merged.settings, key: dtype}
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", merged.generation)


def write_tokenizer(trained: Trained, folder: Path) -> None:
    """Writes the tokenizer with a template whose defaults are those of training."""
    tokenizer = trained.tokenizer
    before = tokenizer.chat_template
    if isinstance(before, str) and trained.template_arguments:
        tokenizer.chat_template = with_defaults(before, trained.template_arguments)
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def _dtype(facts: Facts, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and facts.dtype.is_floating_point else facts.dtype


def _write_vocabulary(settings: dict[str, Any], weights: Weights) -> None:
    """Lets the settings say how many rows the embedding has."""
    names = [n for n in weights.facts if n.endswith("embed_tokens.weight")]
    if names:
        _set(settings, "vocab_size", value=weights.facts[names[0]].shape[0])


def _set(settings: dict[str, Any], key: str, *, value: object) -> None:
    """Changes a setting of the language model, and the whole model's if it has the same."""
    text: Any = settings.get("text_config")
    if isinstance(text, dict):
        text[key] = value
    if not isinstance(text, dict) or key in settings:
        settings[key] = value


def _head_settings(head: Head, config: Any) -> dict[str, Any]:
    kind = model_class(head)._model_mapping[type(config)]
    values = head.settings()
    values["id2label"] = {str(number): name for number, name in values["id2label"].items()}
    return {**values, "architectures": [kind.__name__]}


def _one_or_many(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _refuse_quantized(trained: Trained, settings: Mapping[str, Any]) -> None:
    """Raises UserError for files that hold no plain numbers."""
    kind: Any = settings.get("quantization_config")
    if kind:
        raise UserError(
            "export.quantized-base",
            trained.base.label,
            found=f"weights quantized by {dict(kind).get('quant_method', 'another program')}",
            expected="a base in float32, bfloat16 or float16",
            try_="`--to adapter`, or name the base that the quantized one was made from in "
            "adapter_config.json",
        )
