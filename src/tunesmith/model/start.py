"""Training that goes on from an adapter: with its weights, or on top of a model that has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from tunesmith.config.method import AdapterConfig, LoraConfig
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.io.safeload import adapter_settings, adapter_weights
from tunesmith.model.load import ModelSource, find_model
from tunesmith.model.load_adapter import find_adapter, load_adapter
from tunesmith.model.low_rank import Changes, is_low_rank, lora_products
from tunesmith.types import Reporter

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
"""First values that leave the frozen weights as they are."""

NOT_CONTINUED = (
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "lora_bias"),
    *("arrow_config", "kasa_config", "velora_config", "monteclora_config", "fan_in_fan_out"),
)
"""PEFT's settings that the recipe's `method: lora` has no words for."""


def with_adapter(
    recipe: Recipe, source: ModelSource, reporter: Reporter, folder: Path | None
) -> tuple[Recipe, ModelSource]:
    """The recipe with what the adapter to go on from decides, and the source with its folder.

    Args:
        recipe: as asked for.
        source: of the base model.
        reporter: told about long work.
        folder: where relative paths are tried before the working directory.

    Raises:
        ModelError: there is no adapter, or one that cannot be gone on from (`model.bad-adapter`).
        RecipeError: it does not go with `method` (`recipe.adapter`).
    """
    name = recipe.model.adapter
    if name is None:
        return recipe, source
    found = find_adapter(find_model(ModelConfig(id=name), reporter, folder))
    if found is None:
        raise _unfit(name, "no adapter", "a folder with adapter_config.json")
    adapter_weights(found, name)
    settings = adapter_settings(found, name)
    if recipe.model.merge_adapter:
        _check_merge(recipe, settings)
    else:
        method = continued(recipe, settings, name)
        recipe = recipe.model_copy(update={"method": method})
    return recipe, replace(source, adapter=str(found))


def _check_merge(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuses to train an adapter whose result would fit no model that there is a file of.

    Raises:
        RecipeError: `recipe.adapter`.
    """
    method = recipe.method
    if "num_virtual_tokens" in settings:
        found, expected = "virtual tokens, which are not in the weights", "another adapter"
    elif isinstance(method, AdapterConfig) or (isinstance(method, LoraConfig) and method.dora):
        found = "an adapter that cannot be written together with the merged one"
        expected = "method: lora, full or freeze"
    elif isinstance(method, LoraConfig) and not _is_product(settings):
        found = "a merged adapter that is more than products of two matrices"
        expected = "method: full or freeze, or an adapter of plain LoRA"
    else:
        return
    raise RecipeError("recipe.adapter", "model.merge_adapter", found=found, expected=expected)


def _is_product(settings: Mapping[str, Any]) -> bool:
    extras = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
    return (
        settings["peft_type"] == "LORA"
        and not any(settings.get(key) for key in extras)
        and settings.get("bias", "none") == "none"
        and settings.get("init_lora_weights", True) in PLAIN_INITS
    )


def continued(recipe: Recipe, settings: Mapping[str, Any], label: str) -> LoraConfig:
    """The method that an adapter was trained by, with what the recipe says about the rest.

    Raises:
        ModelError: it is no adapter of LoRA, or has settings that are not known here.
        RecipeError: the recipe asks for another one.
    """
    method = recipe.method
    odd = [key for key in NOT_CONTINUED if settings.get(key)]
    if settings["peft_type"] != "LORA" or odd:
        what = f"one of {settings['peft_type']} with {', '.join(odd) or 'its own settings'}"
        raise _unfit(label, what, "an adapter of LoRA (or merge_adapter: true)")
    if settings.get("init_lora_weights", True) not in PLAIN_INITS:
        what = f"weights that were taken out of the base ({settings['init_lora_weights']})"
        raise _unfit(label, what, "a converted adapter")
    if not isinstance(method, LoraConfig):
        raise RecipeError(
            "recipe.adapter", "method", found=f"method: {method.name} with `model.adapter`",
            expected="method: lora", try_="model.merge_adapter: true adds it to the weights first",
        )  # fmt: skip
    values = _method_values(settings)
    for key in sorted(method.model_fields_set & values.keys()):
        given = getattr(method, key)
        if given not in ("auto", values[key]):
            raise RecipeError(
                "recipe.adapter", f"method.{key}", found=str(given),
                expected=f"{values[key]}, as the adapter has it", try_=f"leave `{key}` out",
            )  # fmt: skip
    try:
        return LoraConfig.model_validate({**method.model_dump(), **values})
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))} {str(problem['input'])[:60]}"
        raise _unfit(label, what, problem["msg"]) from None


def _method_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings in the recipe's words."""
    return {
        "rank": settings["r"],
        "alpha": settings.get("lora_alpha", 8),
        "target": _target(settings),
        "layers": None,
        "rslora": settings.get("use_rslora", False),
        "dora": settings.get("use_dora", False),
        "init": "default",
        "bias": settings.get("bias", "none"),
        "rank_pattern": settings.get("rank_pattern") or {},
        "alpha_pattern": settings.get("alpha_pattern") or {},
        "train_modules": settings.get("modules_to_save") or [],
    }


def _target(settings: Mapping[str, Any]) -> object:
    """Target modules, as one regular expression if some are excluded."""
    target, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if not excluded:
        return sorted(cast("list[str]", target)) if isinstance(target, list) else target
    return rf"(?!(?:{_pattern(excluded)})\Z){_pattern(target)}"


def _pattern(names: object) -> str:
    if isinstance(names, list):
        escaped = (re.escape(str(name)) for name in cast("list[object]", names))
        return rf"(?:.*\.)?(?:{'|'.join(escaped)})"
    return f"(?:{names})"


def merged_start(base: Any, source: ModelSource) -> tuple[Any, Changes]:
    """The base with an adapter added to its weights, and what that has changed.

    Nothing is said about changes that are no products of two matrices.

    Raises:
        ModelError: the adapter does not fit (`model.bad-adapter`).
    """
    folder = Path(source.adapter or "")
    adapted = load_adapter(base, folder, source.adapter or "")
    config = adapted.peft_config["default"]
    plain = is_low_rank(config) and config.init_lora_weights in PLAIN_INITS
    changes = lora_products(adapted) if plain else {}
    return adapted.merge_and_unload(), changes


def continue_start(model: Any, source: ModelSource) -> None:
    """Puts an adapter's weights into a model with an adapter of the same build.

    Raises:
        ModelError: they are others (`model.bad-adapter`).
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    label = source.adapter or ""
    weights = adapter_weights(Path(label), label)
    wanted, stored = get_peft_model_state_dict(model), load_file(weights)
    # PEFT writes the frozen weight of an adapted embedding or head beside its adapter.
    stored = {k: v for k, v in stored.items() if k in wanted or ".base_layer." not in k}
    differing = set(wanted) ^ set(stored)
    differing |= {k for k in set(wanted) & set(stored) if wanted[k].shape != stored[k].shape}
    if differing:
        raise _unfit(label, f"other weights: {', '.join(sorted(differing)[:3])}", "its settings'")
    set_peft_model_state_dict(model, stored)


def _unfit(label: str, found: str, expected: str) -> ModelError:
    return ModelError("model.bad-adapter", label, found=found, expected=expected)
