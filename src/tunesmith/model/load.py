"""Finds and loads models and tokenizers: hub ids, folders, GGUF files, built-in ones."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.model.builtin import PREFIX, find_builtin
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.quantize import check_quantized, keep_layout, quantization_arguments
from tunesmith.ops.attention import attend
from tunesmith.types import Reporter, Tokenizer

PACKED_ATTENTION = "tunesmith"
"""Name of `ops.attention.attend` in transformers' attention registry."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: a folder on disk, or a hub id with its revision."""

    label: str
    path: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder here."""
        return Path(self.path).is_dir()

    @property
    def place(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"pretrained_model_name_or_path": self.path, **revision}


def find_model(model: ModelConfig, reporter: Reporter, folder: Path | None = None) -> ModelSource:
    """Finds a model, converting GGUF on first use; no weights are loaded.

    Args:
        model: the recipe's model.
        reporter: told about a conversion.
        folder: where relative paths are tried before the working directory.

    Raises:
        ModelError: nothing usable is there (`model.*`).
    """
    if model.id.startswith(PREFIX):
        return ModelSource(model.id, str(convert_gguf(find_builtin(model.id), reporter)))
    for base in (folder, Path()):
        path = (base or Path()) / Path(model.id).expanduser()
        if path.is_file() and path.suffix == ".gguf":
            return ModelSource(model.id, str(convert_gguf(path, reporter)))
        if path.is_dir():
            return ModelSource(model.id, str(path.resolve()))
        if path.is_file():
            raise ModelError(
                "model.not-a-model", str(path), found="a file", expected="a folder or a .gguf file"
            )
    looks_like_path = model.id.startswith((".", "/", "~")) or model.id.endswith(".gguf")
    if looks_like_path or not HUB_ID.fullmatch(model.id):
        parent = Path(model.id).expanduser().parent
        names = [item.name for item in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(Path(model.id).name, names, n=1)
        raise ModelError(
            "model.missing",
            "model",
            found=f"no folder or file {model.id}",
            expected="a model folder, a .gguf file, a hub id, or builtin:smollm2-135m",
            try_=f"did you mean {parent / near[0]}?" if near else None,
        )
    return ModelSource(model.id, model.id, model.revision)


def check_weights_exist(source: ModelSource) -> None:
    """Refuses a folder that holds no model, before any data is read.

    Raises:
        ModelError: `model.not-a-model`, with what the folder holds.
    """
    if not source.is_local:
        return
    folder = Path(source.path)
    names = sorted(item.name for item in folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(
            "model.is-adapter",
            source.path,
            found="an adapter",
            expected="the model it was made for",
            try_="name the base model (see base_model_name_or_path in adapter_config.json)",
        )
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if "config.json" not in names or not has_weights:
        ggufs = [name for name in names if name.endswith(".gguf")]
        raise ModelError(
            "model.not-a-model",
            source.path,
            found=f"a folder with {', '.join(names[:8]) or 'nothing'}",
            expected="config.json and .safetensors files",
            try_=f"name the file: {folder / ggufs[0]}" if ggufs else None,
        )


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Loads a model's tokenizer.

    Raises:
        ModelError: there is none (`model.no-tokenizer`), or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source.place)
    except (OSError, ValueError) as error:
        raise _load_error(source, error, "model.no-tokenizer", "a tokenizer") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "model.slow-tokenizer",
            source.label,
            found=f"{type(tokenizer).__name__}, which has no tokenizer.json",
            expected="a fast tokenizer (tokenizer.json)",
        )
    # Some trainers save their truncation and padding into tokenizer.json: it must not cut data.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.eos_token is None:
        raise ModelError(
            "model.no-eos",
            source.label,
            found="a tokenizer without an EOS token",
            expected="eos_token in tokenizer_config.json: it teaches the model where to stop",
        )
    return tokenizer


def load_config(source: ModelSource) -> Any:
    """Loads a model's configuration.

    Raises:
        ModelError: `model.no-config`, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**source.place)
    except (OSError, ValueError) as error:
        raise _load_error(source, error, "model.no-config", "a model configuration") from error


def fingerprint(source: ModelSource, config: Any) -> str:
    """Tells one base model from another: the hub's commit, or configuration and file sizes.

    Not covered: a local file whose bytes change and whose size does not.
    """
    commit = getattr(config, "_commit_hash", None)
    if not source.is_local:
        return str(commit or source.revision or "hub")[:12]
    sizes = [(f.name, f.stat().st_size) for f in sorted(Path(source.path).glob("*.safetensors"))]
    text = json.dumps([config.to_json_string(use_diff=True), sizes])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_model(
    source: ModelSource, *, dtype: str = "auto", attention: str = "sdpa", quantize: str = "none"
) -> Any:
    """Loads a causal language model's weights onto the CPU, in eval mode.

    Args:
        source: from `find_model`.
        dtype: float32, bfloat16, or auto for the files' own.
        attention: a name in transformers' attention registry.
        quantize: nf4 quantizes the linear layers while they are read, and leaves the model on the
            accelerator if there is one.

    Raises:
        ModelError: the files cannot be read as a causal language model (`model.unreadable`), or
            not be quantized.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    # A name that has no mask function: transformers then builds no mask (masking_utils.py).
    AttentionInterface.register(PACKED_ATTENTION, attend)
    is_plain = quantize == "none"
    how = {} if is_plain else quantization_arguments(source.label, load_config(source), dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source.place, dtype=dtype, attn_implementation=attention, **how
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _load_error(source, error, "model.unreadable", "a causal language model") from error
    if not is_plain:
        check_quantized(model, source.label)
    keep_layout(model)
    return model


def random_model(config: Any, *, is_bf16: bool) -> Any:
    """A model with random weights that takes packed batches, for timing and tests."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(PACKED_ATTENTION, attend)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=PACKED_ATTENTION
    )


def _load_error(source: ModelSource, error: Exception, code: str, expected: str) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    try_ = None
    if not source.is_local:
        try_ = (
            "check the id and the network, `hf auth login` for gated models, or name a folder "
            "on disk"
        )
    return ModelError(code, source.label, found=reason, expected=expected, try_=try_)
