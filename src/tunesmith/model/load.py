"""Finds and loads models and tokenizers: hub ids, folders, GGUF files, built-in ones.

All is loaded through `io.safeload`'s views: no pickle is read and no code of a model is run.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.io.retry import NoAnswerError
from tunesmith.io.safeload import model_view, read_settings, refuse_pickles, weight_files
from tunesmith.io.snapshot import HubRepository, explain
from tunesmith.model.builtin import PREFIX, find_builtin
from tunesmith.model.fetch import fetch_model, list_files
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.heads import Head, check_head, put_head
from tunesmith.model.quantize import check_quantized, keep_layout, quantization_arguments
from tunesmith.model.vocabulary import (
    NOTHING_NEW,
    NewTokens,
    extend_config,
    extend_embeddings,
    extend_tokenizer,
    new_tokens_of,
)
from tunesmith.ops.attention import attend
from tunesmith.ops.memory_errors import is_out_of_memory
from tunesmith.types import Reporter, Tokenizer

PACKED_ATTENTION = "tunesmith"
"""Name of `ops.attention.attend` in transformers' attention registry."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: a folder on disk, or a hub id with its revision.

    `adapter` is the folder of an adapter to go on from, if there is one; `head` what takes the
    place of the vocabulary's logits, None if nothing does; `new_tokens` what its vocabulary gets.
    """

    label: str
    path: str
    revision: str | None = None
    adapter: str | None = None
    head: Head | None = None
    new_tokens: NewTokens = NOTHING_NEW

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder here."""
        return Path(self.path).is_dir()


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers and PEFT raise for settings and files that do not fit together.

    Errors of memory are RuntimeErrors, too: see `is_out_of_memory`.
    """
    from huggingface_hub.errors import StrictDataclassError

    of_values = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)
    others = (OSError, RuntimeError, AssertionError, re.error, SafetensorError)
    return (*of_values, *others, StrictDataclassError)


def find_model(model: ModelConfig, reporter: Reporter, folder: Path | None = None) -> ModelSource:
    """Finds a model, converting GGUF on first use; no weights are loaded.

    Its tokenizer, configuration and weights will come with the recipe's new tokens.

    Args:
        model: the recipe's model.
        reporter: told about a conversion.
        folder: where relative paths are tried before the working directory.

    Raises:
        ModelError: nothing usable is there (`model.*`).
    """
    return replace(_find(model, reporter, folder), new_tokens=new_tokens_of(model))


def _find(model: ModelConfig, reporter: Reporter, folder: Path | None) -> ModelSource:
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
        ModelError: `model.not-a-model`, with what the folder holds; weights that exist only as
            pickles (`model.pickle`), that are damaged (`model.bad-safetensors`) or elsewhere
            (`model.bad-index`).
    """
    if not source.is_local:
        refuse_pickles(list_files(source.path, source.revision), source.label)
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
    if "config.json" in names:
        refuse_pickles(names, source.path)
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
    weight_files(folder, source.path)


def fetched(source: ModelSource, code: str, expected: str, *, with_weights: bool = False) -> Path:
    """The folder of a model's files, fetched if need be.

    Raises:
        ModelError: of that code: they cannot be had.
    """
    if source.is_local:
        return Path(source.path)
    try:
        return fetch_model(source.path, source.revision, with_weights=with_weights)
    except NoAnswerError as error:
        said = explain(HubRepository(source.path, "model", source.revision), error)
        raise ModelError(
            "model.hub", source.label, found=said.found, expected=said.expected, try_=said.try_
        ) from error
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise _load_error(source, error, code, expected) from error


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Loads a model's tokenizer.

    Raises:
        ModelError: there is none, or none that transformers knows (`model.no-tokenizer`), or the
            hub cannot be reached.
    """
    from transformers import AutoTokenizer

    folder = fetched(source, "model.no-tokenizer", "a tokenizer")
    with model_view(folder, source.label, with_weights=False) as view:
        has_config = _check_tokenizer_class(view, source.label)
        # With its name in it: transformers mends the tokenizers of some models by their names.
        known = {"config": _config(source, view)} if has_config else {}
        try:
            with _BareErrors():
                tokenizer = AutoTokenizer.from_pretrained(view, trust_remote_code=False, **known)
        except loading_errors() as error:
            raise _load_error(source, error, "model.no-tokenizer", "a tokenizer") from error
    tokenizer.name_or_path = source.path
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
    extend_tokenizer(tokenizer, source.new_tokens)
    return tokenizer


def load_config(source: ModelSource) -> Any:
    """Loads a model's configuration.

    Raises:
        ModelError: `model.no-config`, the hub cannot be reached, or transformers does not know such
            a model (`model.unknown-type`).
    """
    folder = fetched(source, "model.no-config", "a model configuration")
    with model_view(folder, source.label, with_weights=False) as view:
        config = _config(source, view)
    if source.new_tokens:
        extend_config(config, source.new_tokens, load_tokenizer(source))
    return config


def _config(source: ModelSource, view: Path) -> Any:
    from transformers import AutoConfig

    if (view / "config.json").exists():
        _check_model_type(read_settings(view / "config.json"), source.label)
    try:
        config = AutoConfig.from_pretrained(view, trust_remote_code=False)
    except loading_errors() as error:
        raise _load_error(source, error, "model.no-config", "a model configuration") from error
    # Any key of the file becomes an attribute, and one of a method's name takes its place.
    hidden = [key for key in vars(config) if callable(getattr(type(config), key, None))]
    if hidden:
        raise ModelError(
            "model.bad-config",
            source.label,
            found=f"the key {hidden[0]}, which is a method of {type(config).__name__}",
            expected="settings",
        )
    config.name_or_path = source.path
    return config


def fingerprint(source: ModelSource, config: Any) -> str:
    """Tells one base model from another: the hub's commit, or configuration and files.

    Of each file its size and 64 samples of 16 KiB are looked at. Not covered: a local file that
    changes in between.
    """
    if not source.is_local:
        # The name of the cache's folder: the commit that the configuration was read from.
        return fetched(source, "model.no-config", "a model configuration").name[:12]
    files = [(f.name, _sampled_hash(f)) for f in sorted(Path(source.path).glob("*.safetensors"))]
    text = json.dumps([config.to_json_string(use_diff=True), files])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


SAMPLES, SAMPLE_BYTES = 64, 16 << 10
"""1 MiB of a file of any size: another training changes all of its tensors."""


def _sampled_hash(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def load_model(
    source: ModelSource, *, dtype: str = "auto", attention: str = "sdpa", quantize: str = "none"
) -> Any:
    """Loads a model's weights onto the CPU, in eval mode.

    It is a causal language model, or with a `source.head` one of scores; a head that the files do
    not have is zero until `draw_head`.

    Args:
        source: from `find_model`.
        dtype: float32, bfloat16, or auto for the files' own.
        attention: a name in transformers' attention registry.
        quantize: nf4 or int8 quantizes the linear layers while they are read, and leaves the model
            on the accelerator if there is one.

    Raises:
        ModelError: the files cannot be read as such a model (`model.unreadable`), have another
            head (`model.head`), or cannot be quantized.
    """
    from transformers import AttentionInterface

    # A name that has no mask function: transformers then builds no mask (masking_utils.py).
    AttentionInterface.register(PACKED_ATTENTION, attend)
    is_plain = quantize == "none"
    what = "a causal language model" if source.head is None else "a model to classify with"
    folder = fetched(source, "model.unreadable", what, with_weights=True)
    with model_view(folder, source.label, with_weights=True) as view:
        config = _config(source, view)
        how = {} if is_plain else quantization_arguments(source.label, config, dtype, quantize)
        if source.head is not None:
            put_head(config, source.head, source.label)
        try:
            model, info = model_class(source.head).from_pretrained(
                view,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **how,
            )
        except loading_errors() as error:
            if is_out_of_memory(error):
                raise
            raise _load_error(source, error, "model.unreadable", what) from error
    if source.head is not None:
        check_head(model, info["missing_keys"], source.label)
    # Adapters and results say what they were made of: by its own name, not by that of the view.
    model.name_or_path = model.config.name_or_path = source.path
    if not is_plain:
        check_quantized(model, source.label)
    keep_layout(model)
    if source.new_tokens:
        extend_embeddings(model, source.new_tokens, load_tokenizer(source))
    return model


def model_class(head: Head | None) -> Any:
    """Transformers' class that finds a language model's own, or that of one with scores."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def random_model(config: Any, *, is_bf16: bool, head: Head | None = None) -> Any:
    """A model with random weights that takes packed batches, for timing and tests."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, attend)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    if head is not None:
        put_head(config, head, type(config).__name__)
    return model_class(head).from_config(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)


class _BareErrors:
    """Makes ValueErrors of bare Exceptions, which tokenizers raises for a broken tokenizer.json."""

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Looks whether one came; other kinds pass."""
        if kind is Exception:
            raise ValueError(str(error)) from error


def _check_model_type(values: dict[str, Any], label: str) -> None:
    """Refuses a model that transformers has no code for: code beside the weights is not run."""
    from transformers import CONFIG_MAPPING

    kind, names = values.get("model_type"), values.get("architectures") or []
    if isinstance(kind, str) and kind in CONFIG_MAPPING and isinstance(names, list):
        unknown = [name for name in names if str(name) not in _architectures()]
    else:
        unknown = [kind]
    if unknown:
        raise ModelError(
            "model.unknown-type",
            label,
            found=f"a model of the type {str(unknown[0])[:100]!r}",
            expected="one that transformers has its own code for; code beside weights is not run",
            try_="name a model of a known architecture, or update transformers",
        )


@functools.cache
def _architectures() -> frozenset[str]:
    """The models of transformers; `dir` of the package would take 0.3 s."""
    from transformers.models.auto import modeling_auto

    tables = [vars(modeling_auto)[n] for n in vars(modeling_auto) if n.endswith("_MAPPING_NAMES")]
    names = [name for table in tables for name in table.values()]
    return frozenset(chain.from_iterable((n,) if isinstance(n, str) else n for n in names))


def _check_tokenizer_class(view: Path, label: str) -> bool:
    """Refuses a class that is no tokenizer; tells whether there is a configuration to go by."""
    from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = None
    for name in ("config.json", "tokenizer_config.json"):
        settings = read_settings(view / name) if (view / name).exists() else {}
        kind = kind or settings.get("model_type")
        wanted = settings.get("tokenizer_class")
        found = tokenizer_class_from_name(wanted) if isinstance(wanted, str) else wanted
        is_class = isinstance(found, type)
        # A stand-in for a class that needs a package which is not installed says so itself.
        if (
            found is not None
            and not (is_class and issubclass(found, PreTrainedTokenizerBase))
            and "dummy" not in getattr(found, "__module__", "")
        ):
            raise ModelError(
                "model.no-tokenizer",
                label,
                found=f"tokenizer_class {str(wanted)[:100]!r}",
                expected="the name of a tokenizer of transformers",
            )
    return kind in CONFIG_MAPPING


def _load_error(source: ModelSource, error: Exception, code: str, expected: str) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    try_ = None
    if not source.is_local:
        try_ = (
            "check the id and the network, `hf auth login` for gated models, or name a folder "
            "on disk"
        )
    return ModelError(code, source.label, found=reason, expected=expected, try_=try_)
