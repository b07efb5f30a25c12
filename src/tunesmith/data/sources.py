"""From what the recipe names to files: registries, hubs, folders, named splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.config.heads import ClassifyConfig
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.recipe import DataConfig, Recipe, SourceConfig
from tunesmith.data.readers import all_files, find_files, named_splits
from tunesmith.data.readers.hub import declared_splits, fetch_dataset, parse_hub_id
from tunesmith.data.readers.splits import WORDS
from tunesmith.data.registry import read_registry
from tunesmith.errors import DataError, Problem
from tunesmith.types import Reporter


@dataclass(frozen=True)
class Source:
    """A source of the recipe with its files, in the order they are read."""

    config: SourceConfig
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """What there is to read."""
        return sum(file.stat().st_size for file in self.files if file.is_file())


@dataclass(frozen=True)
class Sources:
    """Everything a run reads; `validation` is empty where rows of `train` are held out."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    replay: Source | None = None

    @property
    def stored(self) -> tuple[Source, ...]:
        """The sources of the training store; replay, if any, is the last."""
        return (*self.train, self.replay) if self.replay else self.train


def find_recipe_sources(
    recipe: Recipe, locate: Callable[[str], Path], reporter: Reporter
) -> Sources:
    """The sources of a recipe's data, whose rows are read for what its objective learns from.

    Raises:
        DataError: see `find_sources`.
    """
    sources = find_sources(recipe.data, locate, reporter)
    if isinstance(recipe.objective, ClassifyConfig):
        return _read_as(sources, "labeled")
    if isinstance(recipe.objective, SamplingConfig):
        return _read_as(sources, "prompt")
    return sources


def _read_as(sources: Sources, form: str) -> Sources:
    """The sources with this format where the recipe leaves it open."""

    def changed(source: Source) -> Source:
        if source.config.format != "auto":
            return source
        return replace(source, config=source.config.model_copy(update={"format": form}))

    return Sources(
        tuple(map(changed, sources.train)),
        tuple(map(changed, sources.validation)),
        sources.replay and changed(sources.replay),
    )


def find_sources(data: DataConfig, locate: Callable[[str], Path], reporter: Reporter) -> Sources:
    """Finds the files of every source of a recipe.

    Args:
        data: the recipe's part.
        locate: turns a path of the recipe into one that can be opened.
        reporter: shows downloads.

    Raises:
        DataError: something is not there, or not what its hash says.
    """
    configs = list(data.train)
    if data.registry is not None:
        configs += read_registry(locate(data.registry), data.names)
    found = [_place(config, locate, reporter) for config in configs]
    train = tuple(_source(*place) for place in found)
    _say_what_is_left_out(found, train, reporter)
    held_out: list[Source] = []
    if isinstance(data.validation, list):
        held_out = [_source(*_place(config, locate, reporter)) for config in data.validation]
    elif data.validation == "auto":
        held_out = [own for place in found for own in _own_validation(*place)]
    replay = data.replay and _source(*_place(data.replay.source, locate, reporter))
    return Sources(train, tuple(held_out), replay)


Place = tuple[SourceConfig, Path, str | None]
"""A source, where it lies on this machine, and the split that is asked for."""


def _place(config: SourceConfig, locate: Callable[[str], Path], reporter: Reporter) -> Place:
    hub_id = parse_hub_id(config.path)
    if hub_id is None:
        return config, locate(config.path), config.split
    return config, fetch_dataset(hub_id, reporter), hub_id.split or config.split


def _source(config: SourceConfig, path: Path, split: str | None) -> Source:
    declared = _declared_files(path)
    wanted = split or "train"
    files = declared.get(WORDS.get(wanted, wanted)) or find_files(path, split=split)
    if config.sha1 is not None:
        _check_sha1(files[0], config.sha1)
    return Source(config, tuple(files))


def _say_what_is_left_out(
    places: Sequence[Place], sources: Sequence[Source], reporter: Reporter
) -> None:
    """A folder with named splits is read in part: that must not go unseen."""
    for (config, path, split), source in zip(places, sources, strict=True):
        if path.is_dir() and len(source.files) < (total := len(all_files(path))):
            reporter.note(
                f"{config.label}: {len(source.files):,} of {total:,} files are trained on, those "
                f"of split {split or 'train'}"
            )


def _own_validation(config: SourceConfig, path: Path, split: str | None) -> list[Source]:
    """The validation split that a folder or data set brings along."""
    if split not in (None, "train") or not path.is_dir():
        return []
    splits = _declared_files(path) or named_splits(path)
    if not splits.get("validation") or not splits.get("train"):
        return []
    settings = {"split": "validation", "limit": None, "sha1": None}
    return [Source(config.model_copy(update=settings), tuple(splits["validation"]))]


def _declared_files(path: Path) -> dict[str, list[Path]]:
    """The files of each split as the card of a data set from a hub declares them."""
    if not (path / "README.md").is_file():
        return {}
    try:
        found = {
            WORDS.get(split, split): sorted({f for pattern in patterns for f in path.glob(pattern)})
            for split, patterns in declared_splits(path).items()
        }
    except (ValueError, IndexError):  # patterns that pathlib does not take
        return {}
    return {
        split: [file for file in files if file.is_file() and file.name != "README.md"]
        for split, files in found.items()
    }


def _check_sha1(path: Path, expected: str) -> None:
    # The registry's own choice of hash: it guards against a wrong file, not against an enemy.
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()
    if found != expected.lower():
        raise DataError(
            [Problem(str(path), "data.sha1", f"sha1 {found}", f"{expected} (file_sha1)")],
            try_="fetch the file again, or take file_sha1 out if the change is meant",
        )
