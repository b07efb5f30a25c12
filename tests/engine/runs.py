"""Runs of a tiny model for the tests of this folder: built, run to the end, or stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tunesmith import fine_tune, load_recipe
from tunesmith.engine.rundir import open_run
from tunesmith.engine.session import open_session
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.step import Run, update
from tunesmith.errors import Interrupted
from tunesmith.job import prepare
from tunesmith.train import build
from tunesmith.types import Event, SilentReporter


@contextmanager
def make_run(recipe: Path, *overrides: str) -> Generator[Run]:
    loaded = load_recipe(recipe, overrides)
    run_dir = open_run(loaded.recipe, restart=True)
    job = prepare(loaded, SilentReporter())
    with open_session(run_dir, StopSignal(), loaded.recipe.guard) as session:
        run, _, _ = build(job, session, SilentReporter())
        yield run


def train_step(run: Run, step: int) -> tuple[float, float, bool]:
    """One optimizer step, waited for: loss, gradient norm, whether weights were updated."""
    found = update(run, run.loader.batch(step), step)
    assert found is not None
    loss, norm, is_good, *_ = found.tolist()
    return loss, norm, bool(is_good)


def final_bytes(output: Path) -> dict[str, bytes]:
    """Weights and optimizer of the last checkpoint, and the result."""
    last = sorted((output / "checkpoints").glob("step-*"))[-1]
    files = [*last.glob("*.safetensors"), *(output / "model").glob("*.safetensors")]
    assert len(files) == 3
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def run_to_end(recipe: Path, output: Path, **kwargs: Any) -> dict[str, Any]:
    _, summary = fine_tune(load_recipe(recipe, [f"output={output}"]), **kwargs)
    return dict(summary)


def stop_at(step: int) -> Callable[[Event], None]:
    """A listener that sends SIGTERM to this process after a step."""

    def listen(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def run_and_stop(recipe: Path, output: Path, step: int) -> None:
    with pytest.raises(Interrupted) as caught:
        run_to_end(recipe, output, listeners=[stop_at(step)])
    assert caught.value.step == step
