"""Trackers of a recipe: where else the event stream of a run goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

from tunesmith.config.base import Strict


class TensorBoardConfig(Strict):
    """Event files for TensorBoard, on this disk."""

    name: Literal["tensorboard"]
    folder: str | None = None
    """Where they go; null is `tensorboard/` in the run directory."""


class WandbConfig(Strict):
    """Weights & Biases. Its key comes from `wandb login` or WANDB_API_KEY, never from a recipe."""

    name: Literal["wandb"]
    project: str = "tunesmith"
    """The project that gets the run."""
    entity: str | None = None
    """User or team; null is the account's own."""
    run: str | None = None
    """What the run is called there; null takes the name of the run directory."""
    tags: list[str] = Field(default_factory=list[str])
    """Words to find it by."""
    mode: Literal["online", "offline"] | None = None
    """offline writes files for `wandb sync`; null leaves it to WANDB_MODE."""


class SwanlabConfig(Strict):
    """SwanLab. Its key comes from `swanlab login` or SWANLAB_API_KEY."""

    name: Literal["swanlab"]
    project: str = "tunesmith"
    """The project that gets the run."""
    workspace: str | None = None
    """User or organization; null is the account's own."""
    run: str | None = None
    """What the run is called there; null takes the name of the run directory."""
    mode: Literal["online", "local", "offline"] | None = None
    """local writes for `swanlab watch`, offline for `swanlab sync`; null asks SWANLAB_MODE."""


class MlflowConfig(Strict):
    """MLflow."""

    name: Literal["mlflow"]
    experiment: str = "tunesmith"
    """The experiment that gets the run."""
    run: str | None = None
    """What the run is called there; null takes the name of the run directory."""
    tracking_uri: str | None = None
    """Server, database or folder; null leaves it to MLFLOW_TRACKING_URI."""


class TrackioConfig(Strict):
    """trackio: on this disk, or in a Space of Hugging Face."""

    name: Literal["trackio"]
    project: str = "tunesmith"
    """The project that gets the run."""
    run: str | None = None
    """What the run is called there; null takes the name of the run directory."""
    space: str | None = None
    """A Space (`user/name`) that shows it; null stays on this disk."""


class PluginTrackerConfig(Strict):
    """A tracker of an installed package, of the entry point group `tunesmith.trackers`.

    Whoever runs the recipe enables it: `TUNESMITH_PLUGINS=my_tracker`.
    """

    name: Literal["plugin"]
    tracker: str
    """Of the entry point."""
    settings: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    """What it is made with."""


def _long_form(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


TrackerConfig = Annotated[
    TensorBoardConfig
    | WandbConfig
    | SwanlabConfig
    | MlflowConfig
    | TrackioConfig
    | PluginTrackerConfig,
    Field(discriminator="name"),
    BeforeValidator(_long_form),
]
"""One of `log.trackers`; a word alone, such as `tensorboard`, is short for `{name: ...}`."""


def label_of(config: TrackerConfig) -> str:
    """What a tracker is called in messages and files."""
    return config.tracker if isinstance(config, PluginTrackerConfig) else config.name


def checked_trackers(value: list[TrackerConfig]) -> list[TrackerConfig]:
    """The trackers, if no two of them are one.

    Raises:
        ValueError: with what was expected.
    """
    labels = [label_of(config) for config in value]
    if len(set(labels)) < len(labels):
        raise ValueError("each tracker once")
    return value
