"""What a sweep found: the trials, the best recipe, which keys mattered, and a picture of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config.load import LoadedRecipe
from tunesmith.config.sweep import SweepConfig
from tunesmith.errors import RunError
from tunesmith.io.atomic import write_atomic
from tunesmith.io.redact import redact_tree
from tunesmith.sweep.space import best_recipe
from tunesmith.sweep.study import Study
from tunesmith.types import Json


@dataclass(frozen=True)
class Row:
    """One trial: `state` is complete, pruned, fail or running."""

    number: int
    state: str
    values: dict[str, Json]
    value: float | None
    steps: int
    seconds: float
    why: str


@dataclass(frozen=True)
class Outcome:
    """A sweep at its end, or as far as it came.

    Args:
        folder: of the sweep.
        metric: what was compared.
        rows: all trials, the best first.
        best: the number of the best one that came to its end, None if none has.
        importances: share of each key in the spread of the metric; empty if too little is known.
    """

    folder: Path
    metric: str
    rows: list[Row]
    best: int | None
    importances: dict[str, float]


def write_outcome(loaded: LoadedRecipe, study: Study) -> Outcome:
    """Writes trials.json, sweep.png and best.yaml into the sweep's folder.

    Raises:
        RunError: no trial came to its end because all failed (`run.no-trial`).
    """
    rows, best = _rows(study), study.best()
    failed = [row for row in rows if row.state == "fail"]
    if rows and len(failed) == len(rows):
        raise RunError(
            "run.no-trial",
            str(study.folder),
            found=f"{len(rows)} trials that all failed; the first: {failed[0].why}",
            expected="at least one that comes to its end",
            try_="train the recipe itself first, then narrow the space; --restart searches anew",
        )
    importances = study.importances()
    number = None if best is None else int(best.number)
    outcome = Outcome(study.folder, study.sweep.metric, rows, number, importances)
    _write_json(outcome)
    if best is not None:
        recipe = best_recipe(loaded, study.values_of(best), f"{study.folder}-best")
        where = f"# trial {best.number} of {study.folder}: {study.sweep.metric} {best.value:.6g}\n"
        tree = recipe.model_dump(mode="json", exclude_unset=True)
        text = yaml.safe_dump(redact_tree(tree), sort_keys=False, allow_unicode=True)
        write_atomic(study.folder / "best.yaml", where + text)
        plot_sweep(outcome, study.sweep, study.folder / "sweep.png")
    return outcome


def _rows(study: Study) -> list[Row]:
    sign = 1 if study.sweep.direction == "minimize" else -1
    rows = [
        Row(
            number=trial.number,
            state=trial.state.name.lower(),
            values=study.values_of(trial),
            value=trial.user_attrs.get("value", trial.value),
            steps=int(trial.user_attrs.get("steps", 0)),
            seconds=float(trial.user_attrs.get("seconds", 0.0)),
            why=str(trial.user_attrs.get("why", "")),
        )
        for trial in study.trials
    ]
    ranks = {"complete": 0, "pruned": 1, "running": 2}

    def place(row: Row) -> tuple[int, float, int]:
        value = math.inf if row.value is None else sign * row.value
        return ranks.get(row.state, 3), value, row.number

    return sorted(rows, key=place)


def _write_json(outcome: Outcome) -> None:
    tree = {
        "metric": outcome.metric,
        "best": outcome.best,
        "importances": outcome.importances,
        "trials": [vars(row) for row in outcome.rows],
    }
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    write_atomic(outcome.folder / "trials.json", text)


def plot_sweep(outcome: Outcome, sweep: SweepConfig, file: Path) -> None:
    """The metric over each key: finished trials dark, pruned ones light, the best one ringed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(sweep.space)
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for key, axes in zip(keys, grid, strict=False):
        _plot_key(axes, key, outcome, sweep)
    for axes in list(grid)[len(keys) :]:
        axes.set_visible(False)
    figure.savefig(file, dpi=110)


def _plot_key(axes: Any, key: str, outcome: Outcome, sweep: SweepConfig) -> None:
    entry = sweep.space[key]
    is_range = entry.values is None
    names = [_short(value) for value in entry.values or []]
    for row in outcome.rows:
        if row.value is None or key not in row.values:
            continue
        value = row.values[key]
        x = float(str(value)) if is_range else names.index(_short(value))
        is_best = row.number == outcome.best
        axes.plot(
            x,
            row.value,
            marker="o",
            color="tab:blue" if row.state == "complete" else "lightsteelblue",
            markersize=11 if is_best else 7,
            markeredgecolor="tab:orange" if is_best else "none",
            markeredgewidth=2.5,
        )
    if is_range and entry.log:
        axes.set_xscale("log")
    if not is_range:
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
    share = outcome.importances.get(key)
    axes.set_xlabel(key if share is None else f"{key} (importance {share:.2f})")
    axes.set_ylabel(outcome.metric)
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 18 else f"{text[:17]}…"
