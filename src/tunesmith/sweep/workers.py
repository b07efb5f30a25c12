"""A sweep on several devices: a process for each, all of them at trials of the same study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from tunesmith.config.load import LoadedRecipe
from tunesmith.engine.signals import StopSignal
from tunesmith.errors import Interrupted, RunError
from tunesmith.sweep.study import Study
from tunesmith.sweep.trial import Watcher

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
"""For workers to save and stop, before they are ended."""


def num_processes(study: Study) -> int:
    """How many processes a sweep wants: one for each CUDA device, one without."""
    asked = study.sweep.parallel
    return max(1, len(_devices())) if asked == "auto" else asked


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def run_workers(loaded: LoadedRecipe, study: Study, processes: int, watcher: Watcher) -> None:
    """Starts the processes and waits for them; passes a signal on to them.

    Raises:
        Interrupted: a signal came; the same command goes on.
        RunError: a worker ended with an error (`run.worker`).
    """
    unfinished, following = study.unfinished(), _Following(study, watcher)
    with ExitStack() as stack, StopSignal(str(study.folder)) as stop, stop.deferred():
        children = [
            _start(stack, loaded, study, number, unfinished[number::processes])
            for number in range(processes)
        ]
        asked_at = None
        while any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
            following.look()
            if stop.received is not None and asked_at is None:
                asked_at = time.monotonic()
                for child in children:
                    child.terminate()
            if asked_at is not None and time.monotonic() - asked_at > PATIENCE_SECONDS:
                for child in children:
                    child.kill()
        following.look()
    if stop.received is not None:
        raise Interrupted(stop.received, str(study.folder), step=None)
    for number, child in enumerate(children):
        if child.returncode:
            log = study.folder / f"worker-{number}.log"
            raise RunError(
                "run.worker",
                str(log),
                found=f"exit code {child.returncode}: {_last_line(log)}",
                expected="a worker that works to the end",
                try_="run the same command again: it goes on",
            )


def _start(
    stack: ExitStack, loaded: LoadedRecipe, study: Study, number: int, mine: list[int]
) -> subprocess.Popen[bytes]:
    """A worker on a device of its own; its task comes by standard input, where nobody reads it."""
    environment, devices = dict(os.environ), _devices()
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    log = stack.enter_context((study.folder / f"worker-{number}.log").open("ab"))
    child = subprocess.Popen(
        [sys.executable, "-m", "tunesmith.sweep.worker"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        # Ctrl-C reaches all processes of a terminal; a second signal would end a worker at once.
        start_new_session=True,
    )
    task = {
        "recipe": loaded.recipe.model_dump(mode="json", exclude_unset=True),
        "name": loaded.name,
        "folder": str(loaded.folder),
        "output": str(study.folder),
        "mine": mine,
    }
    with suppress(BrokenPipeError), child.stdin or nullcontext() as pipe:
        if pipe is not None:
            pipe.write(json.dumps(task).encode())
    return child


class _Following:
    """Tells the watcher what has changed in the study."""

    def __init__(self, study: Study, watcher: Watcher) -> None:
        self.study, self.watcher = study, watcher
        self.states: dict[int, str] = {trial.number: trial.state.name for trial in study.trials}

    def look(self) -> None:
        """Compares the study with what it was."""
        for trial in self.study.trials:
            before, state = self.states.get(trial.number), trial.state.name
            self.states[trial.number] = state
            if before is None and len(trial.params) == len(self.study.sweep.space):
                self.watcher.begun(trial.number, self.study.values_of(trial))
            if before != state and state != "RUNNING":
                facts = trial.user_attrs
                why = str(facts.get("why", ""))
                self.watcher.ended(trial.number, state.lower(), facts.get("value"), why)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
