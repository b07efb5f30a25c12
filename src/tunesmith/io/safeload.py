"""What a stranger's model folder may say to the libraries that load it.

transformers and PEFT never see the folder itself. They see a view of it: a temporary folder with
links to its weights (safetensors whose headers were checked) and its tokenizer's data, and with
copies of its settings from which all that names code, other files or other places is gone. There is
no pickle in a view and no Python, so nothing can fall back to them.

This is the one place that could unpickle something, and it does not. Not covered: errors in the
native parsers of tokenizers and SentencePiece, and patterns in an adapter's `target_modules` that
take long to match.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tunesmith.errors import ModelError, UserError
from tunesmith.io.headers import check_weights
from tunesmith.io.paths import plain_name, shown

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

DATA_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab")
"""Tokenizers, templates and settings: what a view shows besides weights."""

MAX_JSON_BYTES = 64 << 20
"""Largest file of settings; the index of the largest model has 11 MB."""

MAX_RANK = 1 << 14
MAX_SIZE = 1 << 20

TUNER_KINDS = frozenset(
    {
        *("BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA"),
        *("IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PEANUT", "PSOFT", "RANDLORA"),
        *("ROAD", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA"),
        "WAVEFT",
    }
)
"""Adapters that are their weights and some numbers.

Others stay refused: X-LoRA, Cartridge, CPT and multitask prompts load more files or a tokenizer, by
names in their settings; adaption prompts and OSF change the model's own code or weights; AdaLoRA,
Poly and Shadow have nothing here that would run them."""

PROMPT_KINDS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"})
PROMPT_KEYS = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"),
        *("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    }
)
"""All that virtual tokens need of their settings. The others say how they began, for which PEFT
loads a tokenizer (`tokenizer_name_or_path`, `tokenizer_kwargs` with `trust_remote_code`)."""

# Names code, a kernel, another file or another place, or is transformers' own business. Older
# versions of transformers wrote some of them into honest files, so they are dropped, not refused.
CODE_KEYS = frozenset(
    {
        *("auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "custom_generate"),
        *("attn_implementation", "experts_implementation", "kernel_config", "use_kernels"),
        *("configuration_files", "transformers_weights", "name_or_path", "gguf_file"),
        *("distributed_config", "device_map"),
    }
)
PRIVATE_BUT_PLAIN = frozenset({"_sliding_window_pattern", "_from_model_config"})
"""Keys with an underscore that Gemma 3 and generation_config.json have of right."""

# Only what draws an adapter's first weights, which those in the file replace, or names code or
# files: `megatron_core` is imported, `corda_config` and `lora_ga_config` name pickles.
DROPPED_ADAPTER_KEYS = frozenset(
    {
        *("auto_mapping", "megatron_config", "megatron_core", "runtime_config"),
        *("eva_config", "corda_config", "lora_ga_config"),
    }
)


# Views


@contextmanager
def model_view(folder: Path, label: str, *, with_weights: bool) -> Generator[Path]:
    """Yields a view of a model's folder.

    Args:
        folder: of a model or a tokenizer.
        label: what the user calls it, for errors.
        with_weights: whether they are to be seen and so must be there and sound.

    Raises:
        ModelError: only pickles hold the weights (`model.pickle`), files do not fit their headers
            (`model.bad-safetensors`), the index names others (`model.bad-index`), or a file of
            settings is damaged (`model.bad-config`).
    """
    cleaners: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "config.json": without_code,
        "generation_config.json": without_code,
        "tokenizer_config.json": _clean_tokenizer_config,
    }
    hidden = {INDEX, ADAPTER_CONFIG}
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as temporary:
        view = Path(temporary)
        for file in sorted(folder.iterdir()):
            if file.name in cleaners and file.exists():
                values = cleaners[file.name](read_settings(file))
                (view / file.name).write_text(json.dumps(values), encoding="utf-8")
            elif file.suffix in DATA_SUFFIXES and file.is_file() and file.name not in hidden:
                _show(file, view)
        for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
            (view / file.parent.name).mkdir(exist_ok=True)
            _show(file, view / file.parent.name)
        if with_weights:
            for file in weight_files(folder, label):
                _show(file, view)
            if not (view / WEIGHTS).exists() and (folder / INDEX).exists():
                _show(folder / INDEX, view)
        yield view


@contextmanager
def adapter_view(folder: Path, label: str) -> Generator[Path]:
    """Yields a view of an adapter's folder: its settings and its weights.

    Raises:
        ModelError: as `model_view`, or it is no adapter that is known (`model.bad-adapter`).
    """
    values, weights = adapter_settings(folder, label), adapter_weights(folder, label)
    if values["peft_type"] in PROMPT_KINDS:
        _check_prompt(values, weights, label)
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as temporary:
        view = Path(temporary)
        _show(weights, view)
        (view / ADAPTER_CONFIG).write_text(json.dumps(values), encoding="utf-8")
        yield view


def _show(file: Path, view: Path) -> None:
    # Resolved: files of the hub's cache are links, relative to where they are.
    (view / file.name).symlink_to(file.resolve())


# Weights


def weight_files(folder: Path, label: str) -> list[Path]:
    """The safetensors files that make up a model, their headers checked.

    Raises:
        ModelError: see `model_view`.
    """
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = [folder / name for name in shard_names(folder / INDEX)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles([file.name for file in folder.iterdir()], label)
        raise ModelError(
            "model.not-a-model", label, found="no weights", expected=f"{WEIGHTS} or its shards"
        )
    check_weights(files)
    return files


def shard_names(index: Path) -> list[str]:
    """The files that an index names: all of them safetensors files beside it.

    Raises:
        ModelError: it names something else (`model.bad-index`).
    """
    weight_map = read_settings(index).get("weight_map")
    names = (
        set(cast("dict[str, object]", weight_map).values()) if isinstance(weight_map, dict) else {}
    )
    if not names:
        raise _index_error(index, "no weight_map")
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise _index_error(index, shown(str(name)))
        try:
            plain_name(name)
        except UserError as error:
            raise _index_error(index, f"{shown(name)}, {error.found}") from None
    return sorted(cast("set[str]", names))


def refuse_pickles(names: Iterable[str], label: str) -> None:
    """Refuses weights that exist only as pickles, which run code when they are read.

    Args:
        names: of all files there.
        label: what the user calls the model.

    Raises:
        ModelError: there are some, and no safetensors file (`model.pickle`).
    """
    names = list(names)
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            "model.pickle",
            label,
            found=f"weights in {', '.join(shown(name) for name in pickles[:3])}: pickles, which "
            "can run any code when they are read",
            expected=".safetensors files",
            try_="on the hub, look for a safetensors revision (often `model.revision: refs/pr/1`); "
            "else let the people who trust the file convert it (save_pretrained of transformers or "
            "PEFT writes safetensors)",
        )


def _index_error(index: Path, found: str) -> ModelError:
    return ModelError(
        "model.bad-index",
        str(index),
        found=found,
        expected="a weight_map to safetensors files beside the index",
    )


# Settings


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is none, or too large (`model.bad-config`).
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        values = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise _config_error(file, error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _config_error(file, f"no JSON ({str(error)[:100]})") from None
    if not isinstance(values, dict):
        raise _config_error(file, f"a {type(values).__name__}")
    return cast("dict[str, Any]", values)


def without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a model's settings without keys that name code or other places, at any depth."""
    return {key: _cleaned(value) for key, value in values.items() if not _names_code(key)}


def _names_code(key: str) -> bool:
    return key in CODE_KEYS or (key.startswith("_") and key not in PRIVATE_BUT_PLAIN)


def _cleaned(value: object) -> object:
    if isinstance(value, dict):
        return without_code(cast("dict[str, Any]", value))
    if isinstance(value, list):
        return [_cleaned(item) for item in cast("list[object]", value)]
    return value


def _clean_tokenizer_config(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer without code; its class stays, which the loader of it judges."""
    # Deeper levels hold added tokens, marked by a "__type", and template texts.
    dropped = {"auto_map", "init_inputs", "trust_remote_code", "name_or_path", "gguf_file"}
    return {key: value for key, value in values.items() if key not in dropped and key[:1] != "_"}


# Adapters


def adapter_settings(folder: Path, label: str) -> dict[str, Any]:
    """The settings of an adapter without what names code; the base model's name is a text.

    Raises:
        ModelError: it is of a kind that is not known (`model.bad-adapter`, `model.bad-config`).
    """
    values = read_settings(folder / ADAPTER_CONFIG)
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in TUNER_KINDS | PROMPT_KINDS:
        known = ", ".join(sorted(TUNER_KINDS | PROMPT_KINDS))
        raise _adapter_error(label, f"peft_type {kind!r}", f"one of {known}")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base or not base.isprintable():
        raise _adapter_error(label, f"base_model_name_or_path {base!r}", "a hub id or a folder")
    if revision is not None and not (isinstance(revision, str) and revision.isprintable()):
        raise _adapter_error(label, f"revision {revision!r}", "the name of a revision")
    _check_sizes(values, label)
    if kind in PROMPT_KINDS:
        given = {key: value for key, value in values.items() if key in PROMPT_KEYS}
        return {**given, "inference_mode": True, "num_transformer_submodules": 1}
    return {key: value for key, value in values.items() if key not in DROPPED_ADAPTER_KEYS}


SIZE_KEYS = {
    **dict.fromkeys(("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"), 1),
    **dict.fromkeys(("n_frequency", "num_vectors", "vector_length"), 1),
    **dict.fromkeys(("boft_block_size", "boft_block_num", "oft_block_size", "hybrid_r"), 0),
    **dict.fromkeys(("gralora_k", "group_size", "theta_d_length", "u"), 1),
}
"""Numbers in settings that sizes follow from, and the least that each may be."""

MAX_DEPTH = 64
"""Square matrices in a row that PEANuT may have, each of the rank."""


def _check_sizes(values: Mapping[str, Any], label: str) -> None:
    """Refuses sizes that no honest adapter has and that would ask for all the memory there is.

    Raises:
        ModelError: `model.bad-adapter`.
    """
    kind = values["peft_type"]
    ranks = values.get("rank_pattern") or {}
    if not isinstance(ranks, dict):
        raise _adapter_error(label, f"a rank_pattern {str(ranks)[:60]}", "names with ranks")
    each: list[object] = list(cast("dict[str, object]", ranks).values())
    if kind == "LORA" or values.get("r") is not None:
        each.append(values.get("r"))
    least = 0 if kind == "OFT" else 1
    if not all(type(rank) is int and least <= rank <= MAX_RANK for rank in each):
        raise _adapter_error(label, f"the ranks {str(each)[:60]}", f"1 to {MAX_RANK}")
    needed = ("num_virtual_tokens", "token_dim") if kind in PROMPT_KINDS else ()
    for key, lowest in SIZE_KEYS.items():
        size = values.get(key)
        if size is None and key not in needed:
            continue
        if type(size) is not int or not lowest <= size <= MAX_SIZE:
            raise _adapter_error(label, f"{key} {str(size)[:60]}", f"{lowest} to {MAX_SIZE}")
    depth = values.get("depth") or 0
    if type(depth) is not int or not 0 <= depth <= MAX_DEPTH:
        raise _adapter_error(label, f"depth {str(depth)[:60]}", f"0 to {MAX_DEPTH}")


def _check_prompt(values: Mapping[str, Any], weights: Path, label: str) -> None:
    """Refuses virtual tokens of other sizes than the file has: they would be made before loading.

    Raises:
        ModelError: `model.bad-adapter`.
    """
    from safetensors import safe_open

    key = "prompt_embeddings"
    with safe_open(weights, framework="numpy") as file:  # pyright: ignore[reportUnknownVariableType]
        there: Any = file.get_slice(key).get_shape() if key in set(file.keys()) else None
    width = values["token_dim"]
    if values["peft_type"] == "PREFIX_TUNING":
        width *= 2 * (values.get("num_layers") or 0)
    if there != [values["num_virtual_tokens"], width]:
        raise _adapter_error(
            label, f"{key} of shape {there}", f"[{values['num_virtual_tokens']}, {width}]"
        )


def adapter_weights(folder: Path, label: str) -> Path:
    """The file of an adapter's weights, its header checked.

    Raises:
        ModelError: there is none (`model.bad-adapter`, `model.pickle`), or it is damaged
            (`model.bad-safetensors`).
    """
    weights = folder / ADAPTER_WEIGHTS
    if not weights.exists():
        refuse_pickles([file.name for file in folder.iterdir()], label)
        raise _adapter_error(label, "no weights", f"a file {ADAPTER_WEIGHTS}")
    check_weights([weights])
    return weights


def _adapter_error(label: str, found: str, expected: str) -> ModelError:
    return ModelError("model.bad-adapter", label, found=found[:200], expected=expected)


def _config_error(file: Path, found: str) -> ModelError:
    return ModelError("model.bad-config", str(file), found=found, expected="a JSON object")
