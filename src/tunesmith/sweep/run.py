"""A sweep from its start to its end: ask for trials, train them, tell what became of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.load import LoadedRecipe, dump_recipe
from tunesmith.config.sweep import SweepConfig
from tunesmith.errors import RecipeError, RunError
from tunesmith.io.atomic import write_atomic
from tunesmith.io.lock import directory_lock
from tunesmith.io.redact import redact
from tunesmith.model.load import load_model
from tunesmith.sweep.results import Outcome, write_outcome
from tunesmith.sweep.shared import SharedBase, leaves_base_alone
from tunesmith.sweep.space import check_space, sweep_of, trial_recipe
from tunesmith.sweep.study import STUDY_FILE, Study, check_optuna
from tunesmith.sweep.together import run_together
from tunesmith.sweep.trial import Watcher, run_trial
from tunesmith.sweep.workers import num_processes, run_workers

MOST_TOGETHER = 4
"""Trials at once by default: four adapters of rank 16 with their moments are 5 % of their base."""

LONELY_TRACKERS = ("swanlab", "plugin")
"""SwanLab has one run a process, and of others nobody knows."""

MAY_DIFFER = ("trials", "minutes", "parallel", "together")
"""Of a sweep: what may change between two starts of it."""


def search(loaded: LoadedRecipe, file: Path, watcher: Watcher, *, restart: bool) -> Outcome:
    """Runs a sweep to its end, or goes on with it; writes best.yaml, trials.json and sweep.png.

    Args:
        loaded: the recipe, with its `sweep`.
        file: where it stands.
        watcher: follows the trials.
        restart: search anew; an earlier sweep is kept aside.

    Raises:
        RecipeError: the space does not fit the recipe, or Optuna is not there.
        RunError: the folder holds something else (`run.foreign`), or a sweep of another space
            (`run.recipe-changed`); all trials failed (`run.no-trial`).
        Interrupted: a signal came; the same command goes on.
    """
    check_optuna()
    check_space(loaded, file)
    folder = open_folder(loaded, restart=restart)
    with directory_lock(folder):
        study = Study(folder, sweep_of(loaded))
        processes, started = num_processes(study), time.monotonic()
        try:
            if processes > 1:
                run_workers(loaded, study, processes, watcher)
            else:
                work(loaded, study, watcher, mine=study.unfinished())
        finally:
            study.add_spent(time.monotonic() - started)
        return write_outcome(loaded, study)


@dataclass
class Clock:
    """The time that a sweep may take: that of earlier starts counts, too."""

    sweep: SweepConfig
    spent_seconds: float
    started: float

    def is_over(self) -> bool:
        """Whether it is used up."""
        if self.sweep.minutes is None:
            return False
        now = self.spent_seconds + time.monotonic() - self.started
        return now > 60 * self.sweep.minutes


def work(
    loaded: LoadedRecipe,
    study: Study,
    watcher: Watcher,
    *,
    mine: list[int],
    is_told_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains trials until there are no more or time is up.

    Args:
        loaded: the recipe of the sweep.
        study: of its trials.
        watcher: follows them.
        mine: trials to go on with first.
        is_told_to_stop: whether whoever started this process is gone.
    """
    clock, base = Clock(study.sweep, study.spent_seconds(), time.monotonic()), SharedBase()

    def is_over() -> bool:
        return clock.is_over() or is_told_to_stop()

    waiting = list(mine)
    while not is_over():
        group = _next_group(loaded, study, waiting)
        if not group:
            return
        if len(group) > 1:
            is_done = run_together(loaded, study, group, base, watcher=watcher, is_over=is_over)
        else:
            is_shared = _model_to_share(loaded, study, group[0]) is not None
            load = base.load if is_shared else load_model
            is_done = run_trial(
                loaded, study, group[0], watcher=watcher, is_over=is_over, load=load
            )
        if not is_done:
            return


def _next_group(loaded: LoadedRecipe, study: Study, waiting: list[int]) -> list[int]:
    """The trials to train next: several if they can share a base."""
    asked = study.sweep.together
    most = MOST_TOGETHER if asked == "auto" else asked
    if any(tracker.name in LONELY_TRACKERS for tracker in loaded.recipe.log.trackers):
        most = 1
    group, models = list[int](), set[str | None]()
    while len(group) < most:
        number = waiting[0] if waiting else study.ask()
        if number is None:
            break
        waiting[:1] = [number]
        models.add(_model_to_share(loaded, study, number))
        if group and (None in models or len(models) > 1):
            break
        group.append(waiting.pop(0))
        if None in models:
            break
    return group


def _model_to_share(loaded: LoadedRecipe, study: Study, number: int) -> str | None:
    """The model whose weights a trial leaves alone; None if it changes them."""
    try:
        trial = trial_recipe(loaded, study.values_of(study.frozen(number)), study.folder)
    except RecipeError:  # values that do not go together: told when it is run
        return None
    return trial.recipe.model.model_dump_json() if leaves_base_alone(trial.recipe) else None


def open_folder(loaded: LoadedRecipe, *, restart: bool) -> Path:
    """The folder of a sweep, with the recipe that is searched in it."""
    folder = Path(loaded.recipe.output)
    if restart and folder.exists():
        with directory_lock(folder):  # not while another process works in it
            pass
        folder.rename(folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    strange = [name for name in os.listdir(folder) if name[0] != "."] if folder.exists() else []
    if strange and not (folder / STUDY_FILE).exists():
        raise RunError(
            "run.foreign",
            str(folder),
            found=f"a folder that is no sweep: {', '.join(sorted(strange)[:6])}",
            expected="an empty folder or an earlier start of this sweep",
            try_="choose another `output`",
        )
    folder.mkdir(parents=True, exist_ok=True)
    text, saved = _comparable(loaded), folder / "sweep.yaml"
    if saved.exists() and saved.read_text(encoding="utf-8") != text:
        raise RunError(
            "run.recipe-changed",
            str(folder),
            found="an earlier sweep of another recipe or space (its sweep.yaml)",
            expected="the same, to go on with",
            try_="--restart searches anew (the old sweep is kept aside), another `output` keeps "
            f"both; {', '.join(MAY_DIFFER)} may change",
        )
    write_atomic(saved, text)
    return folder


def _comparable(loaded: LoadedRecipe) -> str:
    sweep = sweep_of(loaded).model_copy(update=dict.fromkeys(MAY_DIFFER))
    return redact(dump_recipe(loaded.recipe.model_copy(update={"sweep": sweep, "output": "auto"})))
