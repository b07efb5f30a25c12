"""Checkpoints: whole or absent, verified by hash, rotated without ever leaving a half.

`checkpoints/step-00000012/` holds the trained weights in their usual format, `optim.safetensors`
(the optimizer's moments and float32 master copies, by parameter name), `state.json`, and
`MANIFEST.json` written last. The directory appears by one rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tunesmith.engine.state import TrainState
from tunesmith.errors import CheckpointError
from tunesmith.io.atomic import atomic_directory, sweep_temporaries
from tunesmith.io.manifest import MANIFEST, find_damage, write_manifest

WeightsFunction = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: how many of the newest stay; the best stays besides.
        save_weights: writes the trained weights into a folder.
        load_weights: copies them back into the model.
    """

    folder: Path
    keep: int
    save_weights: WeightsFunction
    load_weights: WeightsFunction

    def save(self, state: TrainState, optimizer: Mapping[str, torch.Tensor]) -> Path:
        """Writes a checkpoint of this step, then removes those that are no longer kept."""
        target = self.folder / f"step-{state.step:08d}"
        with atomic_directory(target) as temporary:
            self.save_weights(temporary)
            save_file(dict(optimizer), temporary / "optim.safetensors")
            (temporary / "state.json").write_text(state.to_json(), encoding="utf-8")
            write_manifest(temporary, {"step": state.step})
        self._rotate(state)
        return target

    def latest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, or None if there is none at all.

        Broken ones are renamed `*.corrupt`, with a warning that says what is wrong.

        Raises:
            CheckpointError: there are checkpoints, but every one is broken
                (`checkpoint.all-corrupt`).
        """
        if not self.folder.is_dir():
            return None
        sweep_temporaries(self.folder)
        damages: list[str] = []
        for path in reversed(self.paths()):
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

    def load(self, path: Path) -> tuple[TrainState, dict[str, torch.Tensor]]:
        """Copies the weights into the model; returns the state and the optimizer's tensors."""
        self.load_weights(path)
        state = TrainState.from_json(_state_text(path))
        return state, load_file(path / "optim.safetensors")

    def load_best(self, step: int, warn: Callable[[str], None]) -> bool:
        """Copies the weights of a step's checkpoint into the model if it is whole, else warns."""
        path = self.folder / f"step-{step:08d}"
        damage = find_damage(path)
        if damage is not None:
            warn(f"the best checkpoint {path.name} cannot be used ({damage}); the last weights are")
            return False
        self.load_weights(path)
        return True

    def paths(self) -> list[Path]:
        """Checkpoint directories, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix == "")

    def _rotate(self, state: TrainState) -> None:
        newest = self.paths()[-self.keep :]
        kept = {path.name for path in newest}
        # The best step of every kept one: if the newest breaks, the one before needs its own.
        bests = {TrainState.from_json(_state_text(path)).best_step for path in newest}
        kept |= {f"step-{step:08d}" for step in {*bests, state.best_step} if step is not None}
        for path in self.paths():
            if path.name not in kept:
                # Without its manifest a half-removed directory is never taken for a checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def _state_text(path: Path) -> str:
    return (path / "state.json").read_text(encoding="utf-8")


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    path.replace(aside)
