"""The space of a sweep: checked against the recipe before anything runs, then a recipe a trial."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from tunesmith.config.load import LoadedRecipe, recipe_with
from tunesmith.config.recipe import Recipe
from tunesmith.config.sweep import SpaceEntry, SweepConfig
from tunesmith.errors import RecipeError
from tunesmith.types import Json

Values = Mapping[str, Json]

FIXED_KEYS = ("output", "sweep", "log", "data.validation", "evaluate.every", "train.max_steps")
"""What trials must have in common to be compared, or belongs to each of them alone."""

NAMED_TRACKERS = ("wandb", "swanlab", "mlflow", "trackio")
"""Those whose runs have names."""

PATH_KEYS = ("path", "id", "registry", "template", "adapter", "general")


def sweep_of(loaded: LoadedRecipe) -> SweepConfig:
    """The recipe's sweep.

    Raises:
        RecipeError: there is none (`recipe.missing-key`).
    """
    if loaded.recipe.sweep is None:
        raise RecipeError(
            "recipe.missing-key",
            loaded.name,
            found="no `sweep`",
            expected="what to search, e.g. sweep: {space: {method.rank: [8, 16]}} (docs/sweep.md)",
        )
    return loaded.recipe.sweep


def check_space(loaded: LoadedRecipe, file: Path) -> None:
    """Tries every end of every range and every value of every list in the recipe.

    Args:
        loaded: the recipe with its sweep.
        file: where it stands, for the lines of wrong keys.

    Raises:
        RecipeError: a key that is not there, with the nearest one, or a value that it cannot have;
            a key that all trials must have in common (`recipe.bad-value`); no validation to compare
            trials by.
    """
    sweep, lines = sweep_of(loaded), _lines(file)
    if loaded.recipe.data.validation == 0:
        raise RecipeError(
            "recipe.bad-value",
            f"{file}: data.validation",
            found="nothing held out",
            expected="rows to compare trials by: data.validation=auto",
        )
    for key, entry in sweep.space.items():
        where = f"{file}:{lines[key]}" if key in lines else f"sweep.space.{key}"
        if key.startswith(FIXED_KEYS):
            raise RecipeError(
                "recipe.bad-value",
                where,
                found=f"{key} in a sweep",
                expected="a key that trials may differ in",
            )
        for value in _ends(entry):
            try:
                trial_recipe(loaded, {key: value}, Path("trial"))
            except RecipeError as error:
                raise RecipeError(
                    error.code, where, found=error.found, expected=error.expected, try_=error.try_
                ) from None


def trial_recipe(loaded: LoadedRecipe, values: Values, output: Path) -> LoadedRecipe:
    """The recipe of one trial; trackers call it by the sweep's name and its own.

    Answers to look at and general questions are left out: they cost time in every trial and
    change no number that is compared.

    Raises:
        RecipeError: the values do not go together.
    """
    tree = _tree(loaded.recipe, output)
    tree["evaluate"] = {**tree["evaluate"], "samples": 0, "general": None}
    for tracker in tree.get("log", {}).get("trackers", []):
        if tracker["name"] in NAMED_TRACKERS:
            tracker.setdefault("run", f"{output.absolute().parent.name}-{output.name}")
    found = recipe_with(tree, _overrides(values), name=output.name)
    return replace(found, folder=loaded.folder)


def best_recipe(loaded: LoadedRecipe, values: Values, output: str) -> Recipe:
    """The recipe with the best values, for any working directory."""
    tree = cast("dict[str, Any]", _anchored(_tree(loaded.recipe, Path(output)), loaded))
    return recipe_with(tree, _overrides(values), name="best").recipe


def points(sweep: SweepConfig) -> Iterator[dict[str, Json]]:
    """All combinations of a space of lists, the last key changing fastest."""
    lists = [entry.values or [] for entry in sweep.space.values()]
    for chosen in itertools.product(*lists):
        yield dict(zip(sweep.space, cast("tuple[Json, ...]", chosen), strict=True))


def _tree(recipe: Recipe, output: Path) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    return {**tree, "evaluate": tree.get("evaluate", {}), "output": str(output)}


def _overrides(values: Values) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _ends(entry: SpaceEntry) -> list[Json]:
    if entry.values is not None:
        return cast("list[Json]", entry.values)
    return [cast("Json", entry.low), cast("Json", entry.high)]


def _lines(file: Path) -> dict[str, int]:
    """The lines of the keys of `sweep.space`; none if it was given on the command line."""
    node: Any = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    for name in ("sweep", "space"):
        inner = [value for key, value in getattr(node, "value", []) if key.value == name]
        node = inner[0] if inner else None
    return {key.value: key.start_mark.line + 1 for key, _ in getattr(node, "value", [])}


def _anchored(tree: object, loaded: LoadedRecipe, key: str = "") -> object:
    """Paths beside the recipe as absolute ones; everything else as it is."""
    if isinstance(tree, dict):
        items = cast("dict[str, object]", tree).items()
        return {name: _anchored(value, loaded, name) for name, value in items}
    if isinstance(tree, list):
        return [_anchored(value, loaded, key) for value in cast("list[object]", tree)]
    if isinstance(tree, str) and key in PATH_KEYS and (loaded.folder / tree).exists():
        return str((loaded.folder / tree).resolve())
    return tree
