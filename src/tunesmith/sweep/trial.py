"""One trial: an ordinary training in a run directory of its own, perhaps ended early."""

from __future__ import annotations

import difflib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunesmith.config.load import LoadedRecipe
from tunesmith.engine.events import read_events
from tunesmith.engine.signals import StopSignal
from tunesmith.errors import (
    DiskError,
    Interrupted,
    LockError,
    RecipeError,
    TunesmithError,
)
from tunesmith.model.load import load_model
from tunesmith.sweep.space import trial_recipe
from tunesmith.sweep.study import MOST_STARTS, Study
from tunesmith.train import train
from tunesmith.types import Event, Json, Listener


class Watcher(Protocol):
    """Follows a sweep, as a person does."""

    def begun(self, number: int, values: dict[str, Json]) -> None:
        """A trial begins, or goes on."""
        ...

    def told(self, number: int, event: Event) -> None:
        """A trial tells something."""
        ...

    def ended(self, number: int, state: str, value: float | None, why: str) -> None:
        """A trial is at its end: complete, pruned, fail or stopped, with the best it reached."""
        ...


class TrialStop(StopSignal):
    """What ends a trial at a step boundary, with all saved: pruned, or out of time.

    Entered only while the trial trains. Signals stop it too, as they stop any run.
    """

    is_pruned = False

    def ask(self) -> None:
        """Asks the run to save and stop, as a signal would."""
        if self.received is None:
            self.received = int(signal.SIGTERM)


@dataclass
class Follower:
    """Hands a trial's evaluations to the study, and asks the run to stop when it is pruned.

    Args:
        study: of the sweep.
        number: of the trial.
        stop: of its run.
        watcher: follows, too.
        is_over: whether the sweep's time is up.
    """

    study: Study
    number: int
    stop: TrialStop
    watcher: Watcher
    is_over: Callable[[], bool]
    _trial: Any = None
    _steps: list[int] = field(default_factory=list[int])

    def __call__(self, event: Event) -> None:
        """Takes one event of the run.

        Raises:
            RecipeError: evaluations do not have the metric (`recipe.sweep`); nothing was trained.
        """
        self.watcher.told(self.number, event)
        if event.kind == "evaluation":
            value = _figure(event.data, self.study.sweep.metric)
            if event.step and math.isfinite(value) and self._is_pruned(event.step, value):
                self.stop.is_pruned = True
                self.stop.ask()
        if self.is_over():
            self.stop.ask()

    def _is_pruned(self, step: int, value: float) -> bool:
        """Reports what is new; steps after a restart come a second time."""
        if self._trial is None:
            self._trial = self.study.trial(self.number)
            file = self.study.folder_of(self.number) / "events.jsonl"
            past = [e["step"] for e in read_events(file) if e["event"] == "evaluation"]
            self._steps = [each for each in past if 0 < each < step]
        if step not in self._steps:
            self._steps.append(step)
        # Rungs count validations: steps mean different things to trials of other batch sizes.
        self._trial.report(value, self._steps.index(step) + 1)
        return bool(self._trial.should_prune())


def run_trial(
    loaded: LoadedRecipe,
    study: Study,
    number: int,
    *,
    watcher: Watcher,
    is_over: Callable[[], bool],
    stop: TrialStop | None = None,
    load: Callable[..., Any] = load_model,
    listeners: tuple[Listener, ...] = (),
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Trains one trial to its end and writes the end down; False if it was stopped before.

    Args:
        loaded: the recipe of the sweep.
        study: knows the trial's values.
        number: of the trial.
        watcher: follows it.
        is_over: whether the sweep's time is up.
        stop: what ends the trial.
        load: gives the base model.
        listeners: follow its events, after the study.
        clock: seconds, of its own time where it shares the process.

    Raises:
        Interrupted: a signal came; the same command goes on.
        RecipeError: the sweep's metric is not there (`recipe.sweep`).
    """
    folder, trial = study.folder_of(number), study.frozen(number)
    values, stop = study.values_of(trial), stop or TrialStop(str(study.folder_of(number)))
    watcher.begun(number, values)
    twin = study.twin_of(number)
    if twin is not None:
        study.finish(number, "COMPLETE", twin.value, same_as=twin.number, seconds=0.0)
        watcher.ended(number, "complete", twin.value, f"the values of trial {twin.number}")
        return True
    if trial.user_attrs.get("starts", 0) >= MOST_STARTS:
        return _end(study, watcher, number, "FAIL", f"begun {MOST_STARTS} times without an end")
    follower = Follower(study, number, stop, watcher, is_over)
    started = clock()
    try:
        recipe = trial_recipe(loaded, values, folder)
        study.begin(number)
        train(recipe, listeners=[follower, *listeners], stop=stop, load=load)
    except (Interrupted, LockError) as error:
        if not stop.is_pruned:
            watcher.ended(number, "stopped", best_value(study, folder), "goes on when you do")
            if isinstance(error, LockError) or is_over():
                return False
            raise
        return _end(study, watcher, number, "PRUNED", "others do better", clock() - started)
    except TunesmithError as error:
        # A full disk says nothing of the trial's values.
        if error.code == "recipe.sweep" or isinstance(error, DiskError):
            raise
        return _end(study, watcher, number, "FAIL", str(error).splitlines()[0], clock() - started)
    return _end(study, watcher, number, "COMPLETE", "", clock() - started)


def _end(
    study: Study, watcher: Watcher, number: int, state: str, why: str, seconds: float = 0.0
) -> bool:
    folder = study.folder_of(number)
    value = best_value(study, folder)
    if state == "COMPLETE" and value is None:
        state, why = "FAIL", "no validation had a finite metric"
    steps = max((event["step"] for event in read_events(folder / "events.jsonl")), default=0)
    study.finish(number, state, value, seconds=round(seconds, 2), steps=steps, why=why)
    watcher.ended(number, state.lower(), value, why)
    return True


def best_value(study: Study, folder: Path) -> float | None:
    """The best of a trial's validations after its first step; None if there is none."""
    metric = study.sweep.metric
    found = [
        float(event[metric])
        for event in read_events(folder / "events.jsonl")
        if event["event"] == "evaluation" and event["step"] and event.get(metric) is not None
    ]
    choose = min if study.sweep.direction == "minimize" else max
    return choose(found, default=None)


def _figure(data: Any, metric: str) -> float:
    value = data.get(metric)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    known = [name for name, each in data.items() if type(each) is float and name != "seconds"]
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
    raise RecipeError(
        "recipe.sweep",
        "sweep.metric",
        found=f"{metric!r}",
        expected=f"a figure of the validation: {', '.join(known)}",
        try_=f"did you mean {near[0]}?" if near else None,
    )
