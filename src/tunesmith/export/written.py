"""What an exporter hands back: how its result is loaded again, and how near it has to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.export.trained import Trained
from tunesmith.export.verify import Prompt, Sample, logits_of, prompt_ids
from tunesmith.export.weights import Weights
from tunesmith.model.load import ModelSource, load_config, load_model, load_tokenizer
from tunesmith.model.load_adapter import load_adapter
from tunesmith.model.vocabulary import make_room
from tunesmith.types import Reporter

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """What is asked of an exporter.

    Args:
        to: the format.
        dtype: of merged weights.
        max_bytes: of a file of weights.
        quantization: of GGUF files.
        samples: the run's own, for verification and for calibration.
        compute: the type that weights are compared in.
    """

    to: str
    dtype: str = "auto"
    max_bytes: int = 5 * 10**9
    quantization: str | None = None
    samples: tuple[Sample, ...] = ()
    compute: str = "float32"


@dataclass(frozen=True)
class Written:
    """An export that lies in its folder.

    Args:
        tolerance: a key of `verify.TOLERANCES`.
        loader: what loads it again, for people.
        logits: of samples by the loaded result; None where nothing here can load it.
        prompt_ids: of a conversation, by the template inside; None if there is none inside.
        notes: what is worth saying.
        checks: further comparisons by name, each gives a line that tells what it saw.
    """

    tolerance: str
    loader: str
    logits: Callable[[Sequence[Sample]], list[torch.Tensor]] | None = None
    prompt_ids: Callable[[Conversation], list[int]] | None = None
    notes: tuple[str, ...] = ()
    checks: tuple[Callable[[Sequence[Prompt]], str], ...] = ()


def load_trained(trained: Trained, *, quantize: str = "none", dtype: str = "auto") -> Any:
    """The model as it was trained, its adapter beside the base's weights.

    Args:
        trained: what is loaded.
        quantize: how the base is quantized.
        dtype: of the base.
    """
    source = replace(trained.base, head=trained.head)
    attention = attention_of(load_config(trained.base).get_text_config())
    model = load_model(source, dtype=dtype, quantize=quantize, attention=attention)
    if trained.adapter is not None:
        make_room(model, len(trained.tokenizer))
        model = load_adapter(model, trained.adapter, trained.label)
    return model.eval()


def attention_of(config: Any) -> str:
    """An attention that computes all of a model: of Gemma 2 PyTorch's own leaves out the caps."""
    return "eager" if config.model_type == "gemma2" else "sdpa"


def without_adapter(model: Any) -> Any:
    """The base of a model that `load_trained` gave, its weights as before; the adapter is gone."""
    return model.unload()


def precise_dtype(weights: Weights) -> str:
    """float32 where it fits into half of the memory, else the files' own type."""
    size = sum(facts.num_bytes(torch.float32) for facts in weights.facts.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "float32" if size <= memory // 2 else "auto"


def folder_logits(
    folder: Path, trained: Trained, dtype: str
) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
    """What gives the logits of a model folder that transformers loads."""

    def logits(samples: Sequence[Sample]) -> list[torch.Tensor]:
        source = ModelSource(str(folder), str(folder), head=trained.head)
        attention = attention_of(load_config(source).get_text_config())
        return logits_of(load_model(source, dtype=dtype, attention=attention).eval(), samples)

    return logits


def folder_prompts(folder: Path) -> Callable[[Conversation], list[int]]:
    """What renders conversations with the tokenizer in a folder, without any argument."""
    loaded: list[Any] = []

    def ids(messages: Conversation) -> list[int]:
        if not loaded:
            loaded.append(load_tokenizer(ModelSource(str(folder), str(folder))))
        return prompt_ids(loaded[0], messages)

    return ids


Exporter = Callable[[Trained, Path, Request, Reporter], Written]
