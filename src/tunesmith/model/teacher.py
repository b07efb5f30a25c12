"""The teacher of a distillation: found and checked before any weights are loaded, then frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.budget import Needs
from tunesmith.config.distill import DistillConfig
from tunesmith.config.method import FullConfig
from tunesmith.config.objective import ObjectiveConfig
from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.model.fast_path import make_fast
from tunesmith.model.load import (
    PACKED_ATTENTION,
    ModelSource,
    check_weights_exist,
    find_model,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.model.load_adapter import adapter_fingerprints, base_of, find_adapter, load_adapter
from tunesmith.model.memory import NF4_BYTES, measure_config
from tunesmith.model.packing import check_packing
from tunesmith.ops.linear_divergence import NUM_BUFFERS, block_bytes
from tunesmith.types import Reporter, Tokenizer


@dataclass(frozen=True)
class Teacher:
    """A teacher that can be loaded.

    Args:
        source: of its weights, and its adapter if it has one.
        quantize: none or nf4.
        num_embeddings: rows of its embedding.
        num_parameters: of the model without adapters.
        num_linear: of these in linear layers, which can be quantized.
        fingerprints: tell it from any other, by names that a person knows.
    """

    source: ModelSource
    quantize: str
    num_embeddings: int
    num_parameters: int
    num_linear: int
    fingerprints: dict[str, str]


def find_teacher(
    config: ObjectiveConfig, reporter: Reporter, folder: Path | None = None
) -> Teacher | None:
    """Finds a model, the result of a run, or an adapter with the model it was made for.

    Args:
        config: the objective; None is found for one without a teacher.
        reporter: told about a conversion.
        folder: where relative paths are tried before the working directory.

    Raises:
        ModelError: nothing usable is there (`model.*`).
    """
    if not isinstance(config, DistillConfig):
        return None
    source = find_model(ModelConfig(id=_result_of(config.teacher, folder)), reporter, folder)
    adapter = find_adapter(source)
    if adapter is not None:
        base = find_model(base_of(adapter, config.teacher), reporter, folder)
        source = replace(base, label=config.teacher, adapter=str(adapter))
    check_weights_exist(replace(source, adapter=None))
    settings = load_config(source)
    sizes = measure_config(settings, FullConfig(name="full"))
    fingerprints = {"teacher": fingerprint(source, settings)}
    fingerprints |= adapter_fingerprints(source.adapter, "teacher")
    return Teacher(
        source,
        config.teacher_quantize,
        sizes.num_embeddings,
        sizes.num_parameters,
        sizes.num_linear,
        fingerprints,
    )


def needs_with(teacher: Teacher | None, needs: Needs, *, is_bf16: bool, device_kind: str) -> Needs:
    """What a training needs that has a teacher beside it.

    Its forward comes first and keeps nothing; its weights stay, and its logits come in chunks.
    """
    if teacher is None:
        return needs
    width = 2 if is_bf16 else 4
    saved = teacher.num_linear * (width - NF4_BYTES) if teacher.quantize == "nf4" else 0
    weights = round(teacher.num_parameters * width - saved)
    return replace(
        needs,
        other_bytes=needs.other_bytes + weights,
        head_bytes=needs.head_bytes + NUM_BUFFERS * block_bytes(device_kind),
        head_per_token=needs.head_per_token + teacher.num_embeddings * width,
    )


def _result_of(name: str, folder: Path | None) -> str:
    """The result's folder if a run directory is named, else the name.

    Raises:
        ModelError: the run has no result yet (`model.unfinished-run`).
    """
    for base in (folder, Path()):
        path = (base or Path()) / Path(name).expanduser()
        if (path / "recipe.resolved.yaml").is_file():
            if not (path / "model").is_dir():
                raise ModelError(
                    "model.unfinished-run", name, found="a run without a model/ folder",
                    expected="a finished run", try_="finish it first: `tunesmith train` goes on",
                )  # fmt: skip
            return str((path / "model").resolve())
    return name


def check_vocabulary(teacher: Teacher | None, tokenizer: Tokenizer, largest_id: int) -> None:
    """Refuses a teacher for which the same numbers are other tokens.

    Numbers that only one tokenizer knows may differ as long as the data has none of them: families
    fill their vocabularies up in different ways.

    Args:
        teacher: whose tokenizer is read; that of its adapter, if it brings one, counts. None is
            fine.
        tokenizer: that made the data.
        largest_id: of the data.

    Raises:
        ModelError: `model.teacher-vocabulary`.
    """
    if teacher is None:
        return
    source = teacher.source
    if source.adapter and (Path(source.adapter) / "tokenizer.json").exists():
        source = ModelSource(source.label, source.adapter)
    ours, theirs = _tokens(tokenizer), _tokens(load_tokenizer(source))
    for number in sorted(ours):
        other = theirs.get(number)
        if other != ours[number] and (other is not None or number <= largest_id):
            has = "no token" if other is None else f"{other!r}"
            raise _unfit(
                source.label, f"{has} under {number}, where the student has {ours[number]!r}"
            )
    if largest_id >= teacher.num_embeddings:
        raise _unfit(source.label, f"token id {largest_id} for {teacher.num_embeddings} embeddings")


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _unfit(label: str, found: str) -> ModelError:
    return ModelError(
        "model.teacher-vocabulary",
        label,
        found=found,
        expected="a teacher with the student's tokenizer",
        try_="take a teacher of the same family",
    )


def load_teacher(teacher: Teacher, *, dtype: str, device: torch.device) -> tuple[Any, str]:
    """Loads a teacher's weights: frozen, in eval mode, for packed batches.

    An adapter is added to the weights, unless they are quantized.

    Args:
        teacher: from `find_teacher`.
        dtype: float32 or bfloat16.
        device: where it will be.

    Returns:
        the model, and a line about its forward.
    """
    source = teacher.source
    model = load_model(source, dtype=dtype, attention=PACKED_ATTENTION, quantize=teacher.quantize)
    check_packing(model, source.label)
    if source.adapter is not None:
        model = load_adapter(model, Path(source.adapter), source.adapter)
        if teacher.quantize == "none":
            model = model.merge_and_unload()
    model = model.to(device).eval().requires_grad_(False)
    return model, f"teacher {source.label}: {make_fast(model)}"
