"""From a recipe's trackers to feeds; what can be known to be wrong is refused before training."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from tunesmith.config.trackers import (
    MlflowConfig,
    PluginTrackerConfig,
    SwanlabConfig,
    TensorBoardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
    label_of,
)
from tunesmith.engine.trackers.base import Tracker
from tunesmith.engine.trackers.feed import Feed
from tunesmith.engine.trackers.mlflow import MlflowTracker
from tunesmith.engine.trackers.swanlab import SwanlabTracker
from tunesmith.engine.trackers.tensorboard import TensorBoardTracker
from tunesmith.engine.trackers.trackio import TrackioTracker
from tunesmith.engine.trackers.wandb import WandbTracker
from tunesmith.errors import RecipeError

GROUP = "tunesmith.trackers"
ENABLED_VARIABLE = "TUNESMITH_PLUGINS"


def check_trackers(configs: Sequence[TrackerConfig]) -> None:
    """Refuses trackers that cannot work here.

    Raises:
        RecipeError: `recipe.tracker`: its library is not installed, or it is a plugin that nobody
            enabled or no package has.
    """
    for config in configs:
        if isinstance(config, PluginTrackerConfig):
            _find_plugin(config.tracker)
        elif find_spec(config.name) is None:
            raise _error(
                config.name,
                found=f"that {config.name} is not installed",
                expected="its library",
                try_=f"pip install 'tunesmith[{config.name}]', or take it out of log.trackers",
            )


def open_feeds(
    configs: Sequence[TrackerConfig], folder: Path, warn: Callable[[str], None]
) -> list[Feed]:
    """A listener for each tracker; none of them does anything before the first event.

    Args:
        configs: of the recipe.
        folder: the run directory.
        warn: tells of a tracker that failed.

    Raises:
        RecipeError: see `check_trackers`.
    """
    check_trackers(configs)
    return [Feed(label_of(config), partial(_make, config), folder, warn) for config in configs]


def _make(config: TrackerConfig) -> Tracker:
    match config:
        case TensorBoardConfig():
            return TensorBoardTracker(config)
        case WandbConfig():
            return WandbTracker(config)
        case SwanlabConfig():
            return SwanlabTracker(config)
        case MlflowConfig():
            return MlflowTracker(config)
        case TrackioConfig():
            return TrackioTracker(config)
        case PluginTrackerConfig():
            make = cast("Callable[..., Any]", _find_plugin(config.tracker).load())
            return cast("Tracker", make(**config.settings))


def _find_plugin(name: str) -> EntryPoint:
    enabled = {part.strip() for part in os.environ.get(ENABLED_VARIABLE, "").split(",")}
    expected = f"an enabled tracker of the entry point group {GROUP}"
    if not enabled & {name, "all"}:
        raise _error(
            name,
            found="a tracker that nobody enabled",
            expected=expected,
            try_=f"{ENABLED_VARIABLE}={name} before the command, if you trust its package",
        )
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise _error(
            name,
            found=f"no such tracker; there are {', '.join(sorted(known)) or 'none'}",
            expected=expected,
            try_=f"did you mean {near[0]}?" if near else "install the package that has it",
        )
    return known[name]


def _error(name: str, *, found: str, expected: str, try_: str) -> RecipeError:
    where = f"log.trackers: {name}"
    return RecipeError("recipe.tracker", where, found=found, expected=expected, try_=try_)
