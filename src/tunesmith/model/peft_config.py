"""PEFT's configuration of an adapter, from the recipe's method."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import warnings
from typing import Any

import torch

from tunesmith.config.method import MUTATING_INITS, AdapterConfig, LoraConfig
from tunesmith.errors import RecipeError

MANAGED_FIELDS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "runtime_config", "tokenizer_name_or_path"),
        *("tokenizer_kwargs", "prompt_tuning_init_text", "num_transformer_submodules"),
        *("token_dim", "num_attention_heads", "num_layers"),
    }
)
"""Fields that follow from the model, or name files or a tokenizer to load."""

OWN_INITS = ("default", "loftq", "eva")
"""First values that are PEFT's plain ones, or ours in their place: files tell of neither."""


def lora_config(
    method: LoraConfig,
    exclude: str | None,
    *,
    is_tied: bool = False,
    tokens: dict[str, list[int]] | None = None,
) -> Any:
    """PEFT's `LoraConfig`.

    Args:
        method: resolved.
        exclude: a regular expression of modules that get no adapter.
        is_tied: embedding and head are one matrix that is trained whole, and stay one.
        tokens: rows of the embedding and the head that are trained, by the layers' names.
    """
    from peft import LoraConfig as PeftLoraConfig

    if method.rank == "auto" or method.alpha == "auto":
        raise ValueError("resolve the recipe before attaching adapters")
    init: Any = True if method.init in OWN_INITS else method.init
    patterns: dict[str, Any] = {key: _whole(value) for key, value in method.alpha_pattern.items()}
    if method.init in MUTATING_INITS and method.rslora and (method.rank_pattern or patterns):
        # PEFT would warn that it cannot convert such an adapter; `low_rank.save_as_one` can.
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        # PEFT's field is an int; alpha/r is a plain division, so a float serves as well.
        lora_alpha=_whole(method.alpha),
        lora_dropout=method.dropout,
        target_modules=method.target,
        # PEFT's layers_to_transform does not go with targets that are one string, as all-linear is.
        exclude_modules=exclude,
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=init,
        bias=method.bias,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=patterns,
        modules_to_save=list(method.train_modules) or None,  # PEFT changes the list
        ensure_weight_tying=is_tied,
        trainable_token_indices=tokens,
    )


def adapter_config(method: AdapterConfig) -> Any:
    """The configuration of any other kind, its fields checked by name.

    Raises:
        RecipeError: PEFT has no field of a name (`recipe.unknown-key`), or refuses a value
            (`recipe.adapter`).
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.kind)]
    known = {field.name for field in dataclasses.fields(kind)} - MANAGED_FIELDS
    for key in method.settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise RecipeError(
                "recipe.unknown-key",
                f"method.{key}",
                found=f"the key `method.{key}`",
                expected=f"one of {', '.join(sorted(known))}",
                try_=f"did you mean `{near[0]}`?" if near else None,
            )
    if method.settings.get("prompt_tuning_init") == "TEXT":
        raise _refusal("prompt_tuning_init: TEXT", "SAMPLE_VOCAB or RANDOM")
    try:
        return kind(task_type="CAUSAL_LM", **copy.deepcopy(method.settings))
    except (ValueError, TypeError, KeyError) as error:
        raise refused_by_peft(method.kind, error) from error


def refused_by_peft(kind: str, error: Exception) -> RecipeError:
    """What to say where PEFT does not take an adapter's settings."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return _refusal(f"{kind}: {text}", "settings that PEFT takes for this model")


def target_error(model: Any, key: str, value: object) -> RecipeError:
    """What to say where no module has a name."""
    return RecipeError(
        "recipe.target",
        f"method.{key}",
        found=f"{value!r}, which fits no layer",
        expected=f"names such as {', '.join(linear_names(model))}",
    )


def linear_names(model: Any) -> list[str]:
    """The last parts of the names of linear layers, twelve at most."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return sorted(names)[:12]


def check_modules(model: Any, names: list[str]) -> None:
    """Refuses names of modules to train whole that the model does not have.

    Raises:
        RecipeError: `recipe.target`.
    """
    there = [name for name, _ in model.named_modules()]
    for wanted in names:
        if not any(re.search(rf"(^|\.){re.escape(wanted)}$", name) for name in there):
            raise target_error(model, "train_modules", wanted)


def _refusal(found: str, expected: str) -> RecipeError:
    return RecipeError("recipe.adapter", "method", found=found, expected=expected)


def _whole(value: float) -> Any:
    return int(value) if float(value).is_integer() else value
