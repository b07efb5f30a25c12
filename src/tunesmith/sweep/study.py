"""The study of a sweep: Optuna's, kept in the sweep's folder, so that a killed sweep goes on.

A trial is its values, its reports and its state; its training is an ordinary run directory. What a
trial is given depends on the number of the trial and on those before it, not on how often the
sweep was started.
"""

from __future__ import annotations

import fcntl
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tunesmith.config.sweep import SpaceEntry, SweepConfig
from tunesmith.errors import RecipeError
from tunesmith.sweep.space import points
from tunesmith.types import Json

STUDY_FILE = "study.journal"
REDUCTION = 3
MOST_STARTS = 4
"""A trial that was begun so often and never came to its end is given up."""

Trial = Any
"""Of Optuna."""


class Study:
    """What is known of a sweep's trials.

    Args:
        folder: of the sweep.
        sweep: what is searched.
    """

    def __init__(self, folder: Path, sweep: SweepConfig) -> None:
        self.folder = folder
        self.sweep = sweep
        self._storage = _storage(folder / STUDY_FILE)
        if sweep.sampler == "grid" and not self._optuna().trials:
            for point in points(sweep):
                self._optuna().enqueue_trial(_encoded(point))

    def _optuna(self, seed: int | None = None) -> Any:
        import optuna

        with _quiet():
            return optuna.create_study(
                storage=self._storage,
                study_name="sweep",
                direction=self.sweep.direction,
                sampler=_sampler(self.sweep, seed),
                pruner=_pruner(self.sweep),
                load_if_exists=True,
            )

    @property
    def trials(self) -> list[Any]:
        """Optuna's frozen trials, those that only wait left out."""
        return [trial for trial in self._optuna().trials if trial.state.name != "WAITING"]

    def folder_of(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.folder / f"trial-{number:03d}"

    def values_of(self, trial: Any) -> dict[str, Json]:
        """What a trial was given."""
        entries = self.sweep.space
        return {key: _decoded(entries[key], value) for key, value in trial.params.items()}

    def unfinished(self) -> list[int]:
        """Trials that were begun and are not at their end."""
        return [trial.number for trial in self.trials if trial.state.name == "RUNNING"]

    def num_left(self) -> int:
        """Trials still to begin."""
        most = self.sweep.trials
        if self.sweep.sampler == "grid":
            most = min(most, sum(1 for _ in points(self.sweep)))
        return max(0, most - len(self.trials))

    def ask(self) -> int | None:
        """Begins a trial; returns its number, None if there are enough."""
        with (self.folder / ".ask").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or two processes would both begin the last one
            if not self.num_left():
                return None
            trial = self._optuna(seed=1_000_003 * self.sweep.seed + len(self.trials)).ask()
            with _quiet():
                for key, entry in self.sweep.space.items():
                    _suggest(trial, key, entry)
            return int(trial.number)

    def begin(self, number: int) -> None:
        """Counts one more start of a trial."""
        starts = self.frozen(number).user_attrs.get("starts", 0)
        self.trial(number).set_user_attr("starts", starts + 1)

    def trial(self, number: int) -> Trial:
        """A trial, to report to."""
        import optuna

        # Another process may have begun it: Optuna's own `ask` gives new ones alone.
        return optuna.trial.Trial(self._optuna(), self.frozen(number)._trial_id)

    def frozen(self, number: int) -> Any:
        """What is known of a trial."""
        return self._optuna().trials[number]

    def finish(self, number: int, state: str, value: float | None, **facts: Json) -> None:
        """Writes a trial's end down: COMPLETE with a value, PRUNED, or FAIL."""
        import optuna

        trial = self.trial(number)
        for name, fact in {**facts, "value": value}.items():
            trial.set_user_attr(name, fact)
        told = value if state == "COMPLETE" else None
        self._optuna().tell(number, told, state=optuna.trial.TrialState[state])

    def best(self) -> Any:
        """The best of the trials that came to their end; None if there is none."""
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        sign = 1 if self.sweep.direction == "minimize" else -1
        return min(done, key=lambda trial: sign * trial.value, default=None)

    def twin_of(self, number: int) -> Any:
        """A finished trial with the same values; None if there is none."""
        params = self.frozen(number).params
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        return next((trial for trial in done if trial.params == params), None)

    def spent_seconds(self) -> float:
        """Time of earlier starts of the sweep; of one that was killed nobody knows."""
        return float(self._optuna().user_attrs.get("spent_seconds", 0.0))

    def add_spent(self, seconds: float) -> None:
        """Adds the time of this start."""
        self._optuna().set_user_attr("spent_seconds", self.spent_seconds() + seconds)

    def importances(self) -> dict[str, float]:
        """How much of the metric's spread each key explains; empty if too little is known."""
        import optuna

        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        if len(done) < 4 or len({trial.value for trial in done}) < 2:
            return {}
        try:
            with _quiet():
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                found = optuna.importance.get_param_importances(self._optuna(), evaluator=evaluator)
        except (RuntimeError, ValueError, ImportError):  # a key had one value alone
            return {}
        return {key: round(float(share), 4) for key, share in found.items()}


def check_optuna() -> None:
    """Refuses to begin without Optuna.

    Raises:
        RecipeError: `recipe.sweep`.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise RecipeError(
            "recipe.sweep",
            "sweep",
            found="that Optuna is not installed",
            expected="it, to search with",
            try_="pip install 'tunesmith[sweep]'",
        )


@contextmanager
def _quiet() -> Generator[None]:
    """Without Optuna's log lines and its notices of what is experimental."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storage(file: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    with _quiet():
        # Its other lock is a symbolic link, which some file systems do not have.
        lock = JournalFileOpenLock(str(file))
        return JournalStorage(JournalFileBackend(str(file), lock_obj=lock))


def _sampler(sweep: SweepConfig, seed: int | None) -> Any:
    import optuna

    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)  # of a grid every point waits in the queue


def _pruner(sweep: SweepConfig) -> Any:
    import optuna

    if sweep.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
    return optuna.pruners.NopPruner()


def _suggest(trial: Any, key: str, entry: SpaceEntry) -> None:
    if entry.values is not None:
        trial.suggest_categorical(key, [json.dumps(value) for value in entry.values])
    elif entry.is_whole:
        trial.suggest_int(key, entry.low, entry.high, log=entry.log)
    else:
        trial.suggest_float(key, entry.low, entry.high, log=entry.log)


def _encoded(point: dict[str, Json]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in point.items()}


def _decoded(entry: SpaceEntry, value: Any) -> Json:
    if entry.values is not None:
        return cast("Json", json.loads(value))
    return value if entry.is_whole else float(f"{value:.4g}")
