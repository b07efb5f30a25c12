"""Reads a recipe file and `key.path=value` overrides; every mistake names its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tunesmith.config.adapter_kinds import REFUSED_KINDS, SHORT_METHODS
from tunesmith.config.recipe import Recipe
from tunesmith.errors import RecipeError
from tunesmith.types import Json

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe with where it came from; `folder` anchors relative data paths."""

    recipe: Recipe
    name: str
    folder: Path

    def locate(self, path: str) -> Path:
        """A data path: beside the recipe if it is there, else in the working directory."""
        beside = self.folder / Path(path).expanduser()
        return beside if beside.exists() else Path(path).expanduser()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and validates a recipe file.

    Args:
        path: the YAML file.
        overrides: `key.path=value` texts; values are read as YAML.

    Raises:
        RecipeError: with `file:line: recipe.*` naming the key, the nearest known key for an
            unknown one, or the place where the YAML breaks.
    """
    path = Path(path)
    text = _read_text(path)
    tree, lines = _parse(text, str(path))
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply_override(tree, override, places)
    recipe = _validate(tree, places, str(path))
    if recipe.output == "auto":
        recipe = recipe.model_copy(update={"output": str(Path("runs") / path.stem)})
    return LoadedRecipe(recipe, path.stem, path.resolve().parent)


def recipe_with(
    tree: Mapping[str, Json], overrides: Sequence[str], *, name: str = "check"
) -> LoadedRecipe:
    """A recipe given as plain data with `key.path=value` overrides, e.g. one made by a command."""
    values, places = dict[str, Any](tree), dict[KeyPath, str]()
    for override in overrides:
        _apply_override(values, override, places)
    return LoadedRecipe(_validate(values, places, "command line"), name, Path.cwd())


def recipe_from(tree: Mapping[str, Json], *, where: str = "recipe") -> Recipe:
    """Validates a recipe given as plain data, e.g. one made by another command."""
    return _validate(dict(tree), {}, where)


def dump_recipe(recipe: Recipe, reasons: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML, with each value's reason as a comment behind it."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if not reasons:
        return text
    _, lines = _parse(text, "resolved recipe")
    rows = text.splitlines()
    for key, reason in reasons.items():
        line = lines.get(tuple(key.split(".")))
        if line is not None:
            rows[line - 1] += f"  # {reason}"
    return "\n".join(rows) + "\n"


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """(Old value, new value) of every key that differs."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    }


WHOLE_SECTIONS = ("model", "data", "method", "objective")
"""Parts of a recipe whose values only make sense together."""


def merge_recipes(base: Recipe, other: Recipe, keys: Iterable[str]) -> Recipe:
    """`base` with the values of `other` at some keys."""
    values, others = base.model_dump(mode="json"), other.model_dump(mode="json")
    for key in keys:
        section, *path = key.split(".")
        if section in WHOLE_SECTIONS or not path:
            values[section] = others[section]
            continue
        inner, other_inner = values[section], others[section]
        for part in path[:-1]:
            inner, other_inner = inner[part], other_inner[part]
        inner[path[-1]] = other_inner[path[-1]]
    return Recipe.model_validate(values)


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in cast("dict[str, object]", value).items():
            flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
        return flat
    return {prefix: value}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        raise RecipeError(
            "recipe.missing",
            str(path),
            found="no such file",
            expected="a recipe (YAML)",
            try_=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "recipe.unreadable", str(path), found=str(error), expected="a UTF-8 YAML file"
        ) from None


def _names_beside(path: Path) -> list[str]:
    return [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []


def _parse(text: str, where: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(
            "recipe.yaml",
            place,
            found=problem,
            expected="valid YAML",
            try_="a space is needed after each colon, and tabs cannot indent",
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            "recipe.shape",
            where,
            found="an empty file" if tree is None else f"a {type(tree).__name__}",
            expected="keys and values, `model:` and `data:` at least",
        )
    lines: dict[KeyPath, int] = {}
    _collect_lines(node, (), lines)
    return cast("dict[str, Any]", tree), lines


def _collect_lines(node: Any, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _collect_lines(value, (*path, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), lines)


def _apply_override(tree: dict[str, Any], override: str, places: dict[KeyPath, str]) -> None:
    key, sign, text = override.partition("=")
    where = f"command line: {override}"
    if not sign or not key:
        raise RecipeError(
            "recipe.override", where, found=override, expected="key.path=value, without spaces"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    # YAML 1.1 reads 1e-4 as text (it wants 1.0e-4); on a command line it is meant as a number.
    value = _as_number(value)
    *parents, last = path = key.split(".")
    target = tree
    for depth, parent in enumerate(parents):
        inner = target.get(parent)
        short = _SHORT_KEYS.get(".".join(path[: depth + 1]))
        if short is not None and isinstance(inner, str | list):  # such as `method: lora`
            inner = {short: inner}
        target[parent] = dict(inner) if isinstance(inner, dict) else {}
        target = target[parent]
    target[last] = value
    places[tuple(path)] = where
    for depth in range(1, len(path)):
        places.setdefault(tuple(path[:depth]), where)


_SHORT_KEYS = {"model": "id", "data": "train", "method": "name", "objective": "name"}


def _as_number(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _numbers(value: Any) -> Any:
    """Turns texts such as 1e-4 into numbers, for the reason given in `_apply_override`."""
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        return {key: _numbers(item) for key, item in items.items()}
    if isinstance(value, str) and value[:1].isdigit() and "e" in value:
        return _as_number(value)
    return value


def _validate(tree: dict[str, Any], places: Mapping[KeyPath, str], where: str) -> Recipe:
    if isinstance(tree.get("train"), dict):
        tree = {**tree, "train": _numbers(tree["train"])}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _first_error(error, places, where) from None


def _first_error(error: ValidationError, places: Mapping[KeyPath, str], where: str) -> RecipeError:
    problems = error.errors(include_url=False)
    # An unknown key says most about what went wrong, so it goes first.
    problem = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    path = _written_path(problem["loc"], places)
    place = _place(path, places, where)
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        last = problem["loc"][-1]
        path = path if path[-1:] == (last,) else (*path, last)
        return _unknown_key(path, place)
    if problem["type"] == "missing":
        return RecipeError(
            "recipe.missing-key", place, found=f"no `{key}`", expected=f"a value for `{key}`"
        )
    # A union reports one problem per member: together they say what is allowed.
    messages = [
        _plain_message(item["msg"])
        for item in problems
        if _written_path(item["loc"], places) == path
    ]
    found = problem.get("input")
    if problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})  # a method has a name, a reward function a kind
        name = str(cast("dict[str, object]", found)[str(context["discriminator"]).strip("'")])
        return _unknown_name(key, name, context["expected_tags"], place)
    return RecipeError(
        "recipe.bad-value",
        place,
        found=f"{found!r} for `{key}`",
        expected=" or ".join(dict.fromkeys(messages)),
    )


def _unknown_name(key: str, name: str, tags: str, place: str) -> RecipeError:
    """What to say of a method or an objective that there is none of, with the nearest one."""
    known = [tag.strip("' ") for tag in tags.split(",")]
    expected, kind = tags.replace(", ", " or "), name.upper().replace("-", "_")
    if key == "method":
        known += SHORT_METHODS
        expected += ", or a short name (docs/methods.md)"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
    try_ = f"did you mean `{near[0]}`?" if near else None
    if key == "method" and kind in REFUSED_KINDS:
        try_ = f"{name} is not there: {REFUSED_KINDS[kind]}"
    return RecipeError(
        "recipe.bad-value", place, found=f"{name!r} for `{key}`", expected=expected, try_=try_
    )


def _plain_message(message: str) -> str:
    for start in ("Value error, ", "Input should be ", "a valid "):
        message = message.removeprefix(start)
    return message.split(", unable to")[0]


def _unknown_key(path: KeyPath, place: str) -> RecipeError:
    known = _keys_at(path[:-1])
    last = str(path[-1])
    near = _OTHER_NAMES.get(last) or next(
        iter(difflib.get_close_matches(last, known, n=1, cutoff=0.5)), None
    )
    return RecipeError(
        "recipe.unknown-key",
        place,
        found=f"the key `{'.'.join(str(part) for part in path)}`",
        expected=f"one of {', '.join(known)}",
        try_=f"did you mean `{near}`?" if near else None,
    )


_OTHER_NAMES = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "per_device_train_batch_size": "train.global_batch",
    "warmup_ratio": "train.warmup",
    "max_grad_norm": "train.clip_norm",
    "lr_scheduler_type": "train.schedule",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "val_size": "data.validation",
    "dataset": "data",
    "model_name_or_path": "model",
    "finetuning_type": "method",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_target": "method.target",
    "output_dir": "output",
}
"""What other tools call our keys."""


def _written_path(loc: tuple[str | int, ...], places: Mapping[KeyPath, str]) -> KeyPath:
    """The key path as the user wrote it: pydantic adds the names of union members."""
    known = {part for key in places for part in key}
    fields = _all_field_names(Recipe)
    path = tuple(part for part in loc if part in fields or part in known or isinstance(part, int))
    last = loc[-1]
    return path if path and (path[-1] == last or last not in fields) else (*path, last)


def _all_field_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            names |= _all_field_names(inner)
    return names


def _place(path: KeyPath, places: Mapping[KeyPath, str], where: str) -> str:
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return where


def _keys_at(path: KeyPath) -> list[str]:
    models: list[type[BaseModel]] = [Recipe]
    for part in path:
        if isinstance(part, int):
            continue
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models_in(model.model_fields[part].annotation)
        ] or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in _models_in(argument)]
