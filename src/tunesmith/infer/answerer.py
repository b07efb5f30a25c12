"""What is to answer: found first, its tokenizer read, its weights loaded only if rows wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from tunesmith.config.load import recipe_from
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.errors import ModelError, RunError
from tunesmith.infer.batch import BatchEngine
from tunesmith.infer.chat_model import find_result, stop_ids
from tunesmith.infer.generate_engine import GenerateEngine
from tunesmith.infer.slot_proof import slot_error
from tunesmith.model.device import Device, find_device, system_memory, used_memory_bytes
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.model.load_adapter import adapter_fingerprints, base_of, find_adapter, load_adapter
from tunesmith.model.merged import cannot_be_merged
from tunesmith.model.vocabulary import make_room
from tunesmith.types import Reporter, Tokenizer


@dataclass(frozen=True)
class Answerer:
    """A model with its tokenizer; nothing is loaded yet.

    Args:
        label: what the user calls it.
        base: the model, or the one under the adapter.
        adapter: its folder; None if there is none.
        tokenizer_source: where the tokenizer is.
        recipe: of the run that it comes from, if it does.
        step: the checkpoint; None for a result.
        dtype: number format of the weights: auto is that of the files.
        has_template: whether the tokenizer carries the chat template of the training; else the
            recipe names it.
    """

    label: str
    base: ModelSource
    adapter: Path | None
    tokenizer_source: ModelSource
    recipe: Recipe | None = None
    step: int | None = None
    dtype: str = "auto"
    has_template: bool = True

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer."""
        return load_tokenizer(self.tokenizer_source)

    def context_tokens(self) -> int | None:
        """Tokens that the model can see; None if its configuration does not say."""
        config = load_config(self.base).get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def fingerprint(self) -> str:
        """Differs from model to model and from one training of it to another."""
        own = fingerprint(self.base, load_config(self.base))
        adapter = adapter_fingerprints(str(self.adapter) if self.adapter else None)
        return "+".join([own, *(value[:12] for _, value in sorted(adapter.items()))])

    @property
    def quantize(self) -> str:
        """What the base is quantized to, as it was in training."""
        return self.recipe.model.quantize if self.recipe and self.adapter else "none"


def find_answerer(
    target: str, reporter: Reporter, *, step: int | None = None, dtype: str = "auto"
) -> Answerer:
    """Finds a run, one of its checkpoints, an adapter, a model folder, a GGUF file or a hub id.

    Raises:
        ModelError: there is nothing (`model.*`).
        RunError: the run has no such checkpoint (`run.no-checkpoint`).
    """
    run = Path(target).expanduser()
    if step is None:
        path, recipe = find_result(target)
    else:
        path, recipe = checkpoint_folder(run, step), run_recipe(run)
    if recipe is not None and recipe.objective.name in ("reward", "classify"):
        raise ModelError(
            "model.no-answers",
            target,
            found=f"a model of the objective {recipe.objective.name}, which gives scores",
            expected="a language model",
            try_=f"tunesmith score {target} DATA",
        )
    adapter = path if (path / "adapter_config.json").exists() else None
    base = find_model(
        ModelConfig(id=str(path) if path.exists() else target)
        if adapter is None
        else base_of(adapter, target),
        reporter,
    )
    if adapter is None and (adapter := find_adapter(base)) is not None:  # of a hub
        base = find_model(base_of(adapter, target), reporter)
    check_weights_exist(base)
    label = target if step is None else f"{target}, step {step}"
    own = _tokenizer_source(run if step is not None else None, adapter or path, target)
    plain = base if step is None or recipe is None else find_model(recipe.model, reporter)
    return Answerer(
        label, base, adapter, own or plain, recipe, step, dtype, has_template=own is not None
    )


def _tokenizer_source(run: Path | None, folder: Path, label: str) -> ModelSource | None:
    """The folder with a tokenizer of its own: the result of a checkpoint's run has the template."""
    folders = [folder, *([run / "model"] if run else [])]
    found = next((each for each in folders if (each / "tokenizer.json").exists()), None)
    return ModelSource(label, str(found)) if found else None


def run_recipe(run: Path) -> Recipe:
    """The recipe that a run was trained by.

    Raises:
        RunError: it is no run (`run.none`).
    """
    file = run / "recipe.resolved.yaml"
    if not file.exists():
        raise RunError(
            "run.none",
            str(run),
            found="no recipe.resolved.yaml in it",
            expected="a run directory, which alone has checkpoints",
        )
    return recipe_from(yaml.safe_load(file.read_text(encoding="utf-8")))


def checkpoint_steps(run: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by their steps, in order."""
    folders = [item for item in (run / "checkpoints").glob("step-*") if item.is_dir()]
    named = {item.name.removeprefix("step-"): item for item in folders}
    return {int(name): named[name] for name in sorted(named) if name.isdecimal()}


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of one.

    Raises:
        RunError: there is none (`run.no-checkpoint`).
    """
    known = checkpoint_steps(run)
    if step not in known:
        raise RunError(
            "run.no-checkpoint",
            f"{run / 'checkpoints'}",
            found=f"no checkpoint of step {step}",
            expected=f"one of: {', '.join(map(str, known)) or 'none is kept'}",
            try_="--checkpoint all takes all that are there",
        )
    return known[step]


@dataclass(frozen=True)
class Loaded:
    """A model with its engine, and how it computes.

    Args:
        model: a language model, in eval mode on its device.
        engine: answers with it.
        how: in words, for people.
    """

    model: Any
    engine: BatchEngine | GenerateEngine
    how: Mapping[str, str] = field(default_factory=dict[str, str])


def load_answerer(answerer: Answerer, tokenizer: Tokenizer, reporter: Reporter) -> Loaded:
    """Loads the weights onto the accelerator if there is one, and chooses the engine."""
    device = find_device()
    with reporter.waiting(f"Loading {answerer.label}"):
        model, adapter = load_merged(answerer, tokenizer, device)
        model = model.to(device.torch_device).eval()
        ends = tuple(stop_ids(model, tokenizer))
        how = {
            "device": device.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "adapter": adapter,
        }
        reason = slot_error(model)
    if reason is not None:
        how["engine"] = f"transformers' generate, in padded batches: {reason}"
        return Loaded(model, GenerateEngine(model, tokenizer, ends), how)
    engine = BatchEngine(model, tokenizer, ends, lambda: free_bytes(device))
    return Loaded(model, engine, how)


def load_merged(answerer: Answerer, tokenizer: Tokenizer, device: Device) -> tuple[Any, str]:
    """Loads the weights, the adapter merged where that can be; says what became of it.

    Args:
        answerer: whose.
        tokenizer: of it.
        device: whose number formats count; the model stays on the CPU, unless it is quantized.
    """
    model = _load(answerer, tokenizer, device)
    if answerer.adapter is None:
        return model, "none"
    if answerer.quantize != "none":
        return model, "apart, for the weights are quantized"
    reason = cannot_be_merged(model)
    return (model.merge_and_unload(), "merged") if reason is None else (model, f"apart: {reason}")


def _load(answerer: Answerer, tokenizer: Tokenizer, device: Device) -> Any:
    dtype, quantize = answerer.dtype, answerer.quantize
    if quantize != "none" and answerer.recipe is not None:
        # The same bits again: those of bfloat16 weights differ from those of float32 ones.
        dtype = answerer.recipe.model.dtype
    model = load_model(answerer.base, dtype=dtype, quantize=quantize)
    if dtype == "auto" and device.kind == "cpu" and _is_slow(model.dtype, device):
        model = model.to(torch.float32)
    if answerer.adapter is None:
        return model
    make_room(model, len(tokenizer.get_vocab()))
    return load_adapter(model, answerer.adapter, answerer.label)


def _is_slow(dtype: torch.dtype, device: Device) -> bool:
    """Half precision on a CPU without instructions for it took ten times as long."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not device.has_fast_bf16)


CACHE_SHARE = 0.6
"""Of the free memory, for keys and values; the rest is for what layers compute."""


def free_bytes(device: Device) -> int:
    """Memory for keys and values."""
    if device.kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(CACHE_SHARE * free)
    free = system_memory() - used_memory_bytes(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        lines = []
    said = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return int(CACHE_SHARE * max(0, min([free, *said])))
