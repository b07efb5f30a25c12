"""The run directory: its files, whose it is, and whether a run may go on in it.

recipe.yaml, recipe.resolved.yaml, events.jsonl, checkpoints/, model/, loss.png, summary.json
(written last: a run with a summary is finished).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from tunesmith.config.load import changed_keys, dump_recipe, merge_recipes, recipe_from
from tunesmith.config.recipe import Recipe
from tunesmith.errors import DiskError, RunError
from tunesmith.io.atomic import write_atomic
from tunesmith.io.lock import directory_lock
from tunesmith.io.redact import redact_tree, restore_tree
from tunesmith.types import Json

HARMLESS_KEYS = (
    "log",
    "checkpoint",
    "output",
    "sweep",
    "evaluate.samples",
    "evaluate.general",
    "guard.hang_warn_seconds",
    "guard.hang_stop_seconds",
)
"""What may change between two starts of a run without changing a number."""

ROUNDING_KEYS = (
    "train.micro_batch_tokens",
    "train.checkpointing",
    "train.checkpointed_layers",
    "train.compile",
)
"""What may change, too: the same samples in the same steps, sums in another order."""


LEFT_BY_A_START = (
    *("recipe.resolved.yaml", "events.jsonl", "heartbeat.json", "stacks-"),
    *("report.html", "samples", "trackers", "forgetting.safetensors"),
)
"""Files and folders of a start that was broken off before it knew its recipe."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run.

    Args:
        path: the directory.
        changes: what is asked for otherwise than at the start before, and changes numbers.
    """

    path: Path
    changes: tuple[str, ...] = ()

    @property
    def events(self) -> Path:
        """The event stream."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(path.suffix == "" for path in self.checkpoints.glob("step-*"))

    @property
    def model(self) -> Path:
        """The result."""
        return self.path / "model"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run measured; None while it is not finished."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _damaged(file, error) from error

    def resolved(self, asked: Recipe) -> Recipe | None:
        """The recipe with all its values, as an earlier start resolved it.

        What is asked for otherwise than at that start is taken from `asked`.
        """
        resolved = _read_recipe(self.path / "recipe.resolved.yaml", asked)
        old = _read_recipe(self.path / "recipe.yaml", asked)
        if resolved is None or old is None:
            return None
        return merge_recipes(resolved, asked, changed_keys(old, asked))

    def save_recipes(self, recipe: Recipe, resolved: Recipe, reasons: dict[str, str]) -> None:
        """Writes down what was asked for and what it was resolved to, at every change of it."""
        if _read_recipe(self.path / "recipe.yaml", recipe) != recipe:
            text = dump_recipe(_without_secrets(resolved), reasons)
            write_atomic(self.path / "recipe.resolved.yaml", text)
            write_atomic(self.path / "recipe.yaml", dump_recipe(_without_secrets(recipe)))

    def save_summary(self, summary: dict[str, Json]) -> None:
        """Marks the run as finished."""
        text = json.dumps(redact_tree(summary), indent=1, ensure_ascii=False)
        write_atomic(self.path / "summary.json", text)


def open_run(recipe: Recipe, *, restart: bool = False, allow_changes: bool = False) -> RunDirectory:
    """Makes or reopens the run directory of a recipe.

    Args:
        recipe: what is asked for.
        restart: move an earlier run aside; it is never deleted.
        allow_changes: go on in it even if the recipe's numbers differ.

    Raises:
        RunError: the directory holds something else (`run.foreign`), or a run of a recipe whose
            numbers differ (`run.recipe-changed`).
        DiskError: it cannot be written (`disk.write`).
    """
    path = Path(recipe.output)
    if restart and path.exists():
        with directory_lock(path):  # not while another process works in it
            pass
        path.rename(path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
    except OSError as error:
        raise DiskError(
            "disk.write",
            str(path),
            found=error.strerror or str(error),
            expected="a folder that can be written",
            try_="choose another `output`",
        ) from error
    old = _read_recipe(path / "recipe.yaml", recipe)
    others = [item.name for item in path.iterdir() if not item.name.startswith(".")]
    # A start that died while it loaded the model leaves these and no recipe.
    strange = [name for name in others if not name.startswith(LEFT_BY_A_START)]
    if old is None and strange:
        raise RunError(
            "run.foreign",
            str(path),
            found=f"a folder that is no run: {', '.join(sorted(strange)[:6])}",
            expected="an empty folder or an earlier start of this run",
            try_="choose another `output`",
        )
    changed = changed_keys(old, recipe) if old is not None else {}
    lines = [f"{key}: {before} -> {after}" for key, (before, after) in changed.items()]
    refused = [line for line in lines if not line.startswith((*HARMLESS_KEYS, *ROUNDING_KEYS))]
    if refused and not allow_changes:
        raise RunError(
            "run.recipe-changed",
            str(path),
            found="an earlier run with another recipe: " + "; ".join(refused),
            expected="the same recipe, to go on exactly",
            try_="--allow-changes goes on all the same, --restart trains anew (the old run is kept "
            "aside), another `output` keeps both",
        )
    return RunDirectory(path, tuple(refused))


def _damaged(file: Path, error: Exception) -> RunError:
    return RunError(
        "run.damaged",
        str(file),
        found=f"what tunesmith did not write ({str(error).splitlines()[0]})",
        expected="the file as it was",
        try_="remove a damaged summary.json: the same command writes it anew; else --restart",
    )


def _without_secrets(recipe: Recipe) -> Recipe:
    return Recipe.model_validate(redact_tree(recipe.model_dump(mode="json")))


def _read_recipe(file: Path, asked: Recipe) -> Recipe | None:
    """A recipe written down earlier, with the secrets that `asked` has at the same places."""
    if not file.exists():
        return None
    try:
        tree = cast("dict[str, Json]", yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(file, error) from error
    return recipe_from(restore_tree(tree, asked.model_dump(mode="json")), where=str(file))
