"""Checkpoints: whole or absent, verified by hash, rotated without ever leaving a half.

`checkpoints/step-00000012/` holds the trained weights in their usual format, `optim.safetensors`
(the optimizer's moments and float32 master copies, by parameter name), `state.json`, and
`MANIFEST.json` written last. The directory appears by one rename. It is written in the background
if a copy of its tensors is small enough to be held in memory; one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from tunesmith.config.recipe import CheckpointConfig
from tunesmith.engine.inline import InlineExecutor, submit_or_do
from tunesmith.engine.state import TrainState
from tunesmith.errors import CheckpointError, DiskError
from tunesmith.io.atomic import atomic_directory, format_bytes, require_space, sweep_temporaries
from tunesmith.io.fault import fault
from tunesmith.io.manifest import MANIFEST, find_damage, write_manifest
from tunesmith.ops.memory_errors import is_out_of_memory

Warn = Callable[[str], None]
STATE, OPTIMIZER = "state.json", "optim.safetensors"


class Optimizer(Protocol):
    """What an optimizer remembers."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name."""
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave; ValueError if it does not fit."""
        ...


class Weights(Protocol):
    """What is trained of a model."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        ...

    def writer(self, *, copies: bool) -> Callable[[Path], None]:
        """What writes the weights into a folder; with `copies`, as they are at this moment."""
        ...

    def load(self, folder: Path) -> None:
        """Copies the weights in a folder back into the model."""
        ...


@dataclass(frozen=True)
class Save:
    """A checkpoint to be written: all that goes into it."""

    target: Path
    state: TrainState
    is_scheduled: bool
    write_weights: Callable[[Path], None]
    optimizer: Mapping[str, torch.Tensor]

    def write(self) -> Path:
        """Writes it.

        Raises:
            DiskError: there is no room, or it cannot be written.
        """
        with atomic_directory(self.target) as temporary:
            self.write_weights(temporary)
            fault("save.write", temporary / OPTIMIZER, step=self.state.step)
            save_file(dict(self.optimizer), temporary / OPTIMIZER)
            fault("save.write", temporary / STATE, step=self.state.step)
            (temporary / STATE).write_text(self.state.to_json(), encoding="utf-8")
            facts = {"step": self.state.step, "scheduled": self.is_scheduled}
            write_manifest(temporary, {**facts})
        return self.target


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: how many of the newest stay; the best and the last scheduled one stay besides.
        weights: of the model.
        optimizer: of these weights.
        in_background: write them from a copy in memory while training goes on.
        extras: what else must survive, such as sampled answers; None if nothing.
    """

    folder: Path
    keep: int
    weights: Weights
    optimizer: Optimizer
    in_background: bool = False
    extras: Weights | None = None
    _pool: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), repr=False
    )
    _under_way: tuple[Save, Future[Path]] | None = field(default=None, repr=False)

    def begin(self, state: TrainState, *, is_scheduled: bool) -> None:
        """Starts a checkpoint of this step; `collect` says when it is there.

        Only the copying of its tensors is waited for, without `in_background` all of it.

        Args:
            state: of this step.
            is_scheduled: the uninterrupted run saves at this step, too.
        """
        try:
            self.require_space()
        except DiskError:
            # What is newest was verified when it was read, or was written by this process.
            self._rotate(state, keep=1)
            self.require_space()
        target = self.folder / f"step-{state.step:08d}"
        parts = self._copies() if self.in_background else None
        if parts is not None:
            save = Save(target, state.copy(), is_scheduled, *parts)
            self._pool, future = submit_or_do(self._pool, save.write)
            self._under_way = (save, future)
            return
        live = (self._writer(copies=False), self.optimizer.tensors())
        save = Save(target, state.copy(), is_scheduled, *live)
        # Training waits: the tensors are the live ones.
        self._under_way = (save, InlineExecutor().submit(save.write))

    def _writer(self, *, copies: bool) -> Callable[[Path], None]:
        write_weights = self.weights.writer(copies=copies)
        if self.extras is None:
            return write_weights
        write_extras = self.extras.writer(copies=copies)

        def write(folder: Path) -> None:
            write_weights(folder)
            write_extras(folder)

        return write

    def _copies(self) -> tuple[Callable[[Path], None], dict[str, torch.Tensor]] | None:
        """Weights and optimizer as they are at this moment; None if memory does not suffice."""
        try:
            tensors = self.optimizer.tensors()
            copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            return self._writer(copies=True), copies
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def collect(self, warn: Warn, *, wait: bool) -> Path | None:
        """The checkpoint that was begun, once it is written; None if none is, or it goes on.

        What fails in the background is tried once more here, with old checkpoints removed.

        Raises:
            DiskError: it failed again.
        """
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return None
        save, future = self._under_way
        self._under_way = None
        try:
            path = future.result()
        except DiskError as error:
            warn(f"checkpoint {save.target.name} could not be saved ({error.found}); once more")
            self._rotate(save.state, keep=1)
            path = self._write_again(save)
        self._rotate(save.state, self.keep)
        return path

    def _write_again(self, save: Save) -> Path:
        try:
            return save.write()
        except DiskError as error:
            raise DiskError(
                error.code,
                str(save.target),
                found=f"{error.found}, twice; the checkpoints before it are whole",
                expected=f"room for {format_bytes(self.num_bytes)}",
                try_="free some space and run the same command again",
            ) from error

    @property
    def num_bytes(self) -> int:
        """Of one checkpoint, but for a few KiB."""
        extras = 0 if self.extras is None else self.extras.num_bytes
        optimizer = sum(tensor.nbytes for tensor in self.optimizer.tensors().values())
        return self.weights.num_bytes + extras + optimizer

    def require_space(self) -> None:
        """Makes sure that a checkpoint has room.

        Raises:
            DiskError: there is no room (`disk.full`).
        """
        place = self.folder if self.folder.is_dir() else self.folder.parent
        require_space(place, self.num_bytes)

    def latest(self, warn: Warn) -> Path | None:
        """The newest whole checkpoint, or None if there is none at all.

        Broken ones are renamed `*.corrupt`, with a warning that says what is wrong.

        Raises:
            CheckpointError: there are checkpoints, but every one is broken
                (`checkpoint.all-corrupt`).
        """
        if not self.folder.is_dir():
            return None
        sweep_temporaries(self.folder)
        # What an earlier start set aside counts, too: else the next one would begin from zero.
        damages = [f"{path.name}" for path in sorted(self.folder.glob("step-*.corrupt"))]
        for path in reversed(self.paths()):
            fault("load.read", path / OPTIMIZER)
            damage = find_damage(path)
            if damage is None:
                return path
            damages.append(f"{path.name}: {damage}")
            warn(f"checkpoint {path.name} is skipped: {damage}")
            _set_aside(path)
        if damages:
            raise CheckpointError(
                "checkpoint.all-corrupt",
                str(self.folder),
                found="; ".join(damages),
                expected="at least one whole checkpoint",
                try_="--restart trains from the beginning (the old run is kept aside)",
            )
        return None

    def latest_scheduled(self) -> Path | None:
        """The newest whole checkpoint that the uninterrupted run has, too."""
        paths = (path for path in reversed(self.paths()) if _is_scheduled(path))
        return next((path for path in paths if find_damage(path) is None), None)

    def load(self, path: Path) -> TrainState:
        """Copies weights and optimizer states back; returns the state.

        Raises:
            CheckpointError: it holds other weights than the model trains
                (`checkpoint.other-weights`), or is of another version (`checkpoint.version`).
        """
        state, tensors = read_state(path), load_file(path / OPTIMIZER)
        try:
            self.weights.load(path)
            if self.extras is not None:
                self.extras.load(path)
            self.optimizer.restore(tensors)
        except ValueError as error:
            raise CheckpointError(
                "checkpoint.other-weights",
                str(path),
                found=str(error),
                expected="the weights that this recipe trains",
                try_="the recipe it was made with, or --restart",
            ) from error
        return state

    def load_best(self, step: int, warn: Warn) -> bool:
        """Copies the weights of a step's checkpoint into the model if it is whole, else warns."""
        path = self.folder / f"step-{step:08d}"
        damage = find_damage(path)
        if damage is not None:
            warn(f"the best checkpoint {path.name} cannot be used ({damage}); the last weights are")
            return False
        self.weights.load(path)
        return True

    def paths(self) -> list[Path]:
        """Checkpoint directories, oldest first."""
        found = (path for path in self.folder.glob("step-*") if path.suffix == "")
        return sorted(path for path in found if path.is_dir())

    def is_scheduled(self, step: int) -> bool:
        """Whether there is a checkpoint of a step that the uninterrupted run has, too."""
        return _is_scheduled(self.folder / f"step-{step:08d}")

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which a rollback undoes."""
        for path in self.paths():
            if path.name > f"step-{step:08d}":
                _remove(path)

    def _rotate(self, state: TrainState | None, keep: int) -> None:
        paths = self.paths()
        newest = paths[-keep:]
        kept = {path.name for path in newest}
        # The best step of every kept one: if the newest breaks, the one before needs its own.
        states = [*filter(None, map(_state_if_readable, newest)), *([state] if state else [])]
        kept |= {f"step-{each.best_step:08d}" for each in states if each.best_step is not None}
        # A rollback must find what it would find in a run that no signal ever stopped.
        kept |= {path.name for path in [path for path in paths if _is_scheduled(path)][-1:]}
        for path in paths:
            if path.name not in kept:
                _remove(path)


def open_checkpoints(
    folder: Path, config: CheckpointConfig, weights: Weights, optimizer: Optimizer
) -> Checkpoints:
    """The checkpoints of a run, as its recipe wants them.

    Raises:
        DiskError: there is no room for one (`disk.full`).
    """
    in_background = config.background is True
    checkpoints = Checkpoints(folder, config.keep, weights, optimizer, in_background)
    checkpoints.require_space()
    return checkpoints


def read_state(path: Path) -> TrainState:
    """The state in a checkpoint.

    Raises:
        CheckpointError: it is of another version of tunesmith (`checkpoint.version`).
    """
    try:
        return TrainState.from_json((path / STATE).read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            "checkpoint.version",
            str(path / STATE),
            found=f"a state with other fields ({error})",
            expected="one that this version of tunesmith wrote",
            try_="the version it was made with, or --restart",
        ) from error


def _state_if_readable(path: Path) -> TrainState | None:
    with suppress(OSError):  # a half-removed, a damaged one, one of another version
        return read_state(path)
    return None


def _is_scheduled(path: Path) -> bool:
    with suppress(OSError, ValueError):
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest.get("scheduled"))
    return False


def _remove(path: Path) -> None:
    # Without its manifest a half-removed directory is never taken for a checkpoint.
    with suppress(OSError):
        fault("save.rotate", path)
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    path.replace(aside)
