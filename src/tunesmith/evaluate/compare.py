"""Runs side by side: what differs in their recipes, what they reached, and whether it compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.evaluate.report.charts import Chart, Drawing, Series, draw, smoothed
from tunesmith.evaluate.report.curves import MAIN, TITLES, best_of, points_of
from tunesmith.evaluate.report.evaluations import Evaluation
from tunesmith.evaluate.report.facts import settings_of, sources_of
from tunesmith.evaluate.report.page import render, write_page
from tunesmith.evaluate.report.reading import RunRecord, read_run
from tunesmith.evaluate.report.verdict import method_of, short_count, speed, trained_seconds
from tunesmith.evaluate.report.wording import clean, duration, figure, metric_name, size
from tunesmith.evaluate.scores import Better

NO_DIFFERENCE = ("output", "log.", "guard.hang", "checkpoint.")
"""Keys that change no number."""

ABSENT = "–"
MOST_COLORS = 8


@dataclass(frozen=True)
class Cell:
    """What one run has in a line.

    Args:
        text: as shown.
        value: the number behind it, None if there is none.
        low: of its 95 % interval.
        high: of the same.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One figure of all runs.

    Args:
        name: of the figure.
        cells: by run.
        better: which direction is, if any is.
        group: the data that a metric was measured on; empty for what is no metric.
    """

    name: str
    cells: tuple[Cell, ...]
    better: Better = "neither"
    group: str = ""

    @property
    def best(self) -> frozenset[int]:
        """Numbers of the runs that are best; none if fewer than two have the figure."""
        known = [cell.value for cell in self.cells if cell.value is not None]
        if self.better == "neither" or len(known) < 2 or len(set(known)) < 2:
            return frozenset()
        best = max(known) if self.better == "higher" else min(known)
        return frozenset(i for i, cell in enumerate(self.cells) if cell.value == best)

    @property
    def is_clear(self) -> bool:
        """Whether the best run's interval lies apart from all others'; True without intervals."""
        best = [self.cells[index] for index in self.best]
        others = [cell for i, cell in enumerate(self.cells) if i not in self.best]
        return not any(_overlap(one, other) for one in best for other in others)


def _overlap(one: Cell, other: Cell) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side.

    Args:
        names: of the runs, all different.
        runs: what their files say.
        settings: keys of the recipes that differ, with each run's value.
        results: what the runs are and reached.
        warnings: why figures may not compare.
    """

    names: tuple[str, ...]
    runs: tuple[RunRecord, ...]
    settings: tuple[Line, ...]
    results: tuple[Line, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs: numbers where there are numbers."""
        runs = [
            {
                "name": name,
                "path": str(run.folder),
                "state": state_of(run),
                "settings": {line.name: _plain(line.cells[i]) for line in self.settings},
                "results": {
                    line.name: _plain(line.cells[i]) for line in self.results if not line.group
                },
                "evaluations": self._scores(i),
            }
            for i, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
        ]
        best = [
            {
                "name": line.name,
                "data": line.group or None,
                "runs": [self.names[i] for i in sorted(line.best)],
                "clear": line.is_clear,
            }
            for line in self.results
            if line.best
        ]
        return {"version": 1, "runs": runs, "best": best, "warnings": list(self.warnings)}

    def _scores(self, index: int) -> dict[str, dict[str, dict[str, float | None]]]:
        """A run's metrics by data."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for line in self.results:
            cell = line.cells[index]
            if line.group and cell.value is not None:
                score = {"value": cell.value, "low": cell.low, "high": cell.high}
                found.setdefault(line.group, {})[line.name] = score
        return found


def _plain(cell: Cell) -> float | str | None:
    if cell.value is not None:
        return cell.value
    return None if cell.text == ABSENT else cell.text


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Reads runs and puts them side by side.

    Raises:
        RunError: one of the folders is no run directory (`run.none`).
    """
    runs = tuple(read_run(folder) for folder in folders)
    names = _names(runs)
    return RunComparison(
        names=names,
        runs=runs,
        settings=tuple(_settings(runs)),
        results=tuple(_results(runs)),
        warnings=tuple(_warnings(runs, names)),
    )


def _names(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Folder names; paths where names are alike; numbers where paths are, too."""
    counts = Counter(run.name for run in runs)
    names = [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]
    again = Counter(names)
    return tuple(
        clean(name if again[name] == 1 else f"{name} ({number})")
        for number, name in enumerate(names, 1)
    )


def state_of(run: RunRecord) -> str:
    """`finished`, or how far the run has come."""
    if run.is_finished:
        return "finished"
    of_all = f" of {run.num_steps:,}" if run.num_steps else ""
    return f"unfinished, step {run.last_step:,}{of_all}"


def _settings(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """The keys whose values differ, in the order of the recipe."""
    settings = [{setting.key: setting for setting in settings_of(run)} for run in runs]
    for key in dict.fromkeys(key for each in settings for key in each):
        known = [each[key] for each in settings if key in each]
        # What only one kind of objective or method has says nothing while it is the default.
        is_told = len(known) == len(runs) or any(setting.why for setting in known)
        found = tuple(Cell(each[key].value if key in each else ABSENT) for each in settings)
        if is_told and len(set(found)) > 1 and not key.startswith(NO_DIFFERENCE):
            yield Line(key, found)


def _results(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """What the runs are and what they reached; lines that no run has are left out."""
    yield Line("state", tuple(Cell(state_of(run)) for run in runs))
    yield Line("model", tuple(Cell(str(run.recipe.get("model.id") or ABSENT)) for run in runs))
    yield Line("method", tuple(Cell(method_of(run)) for run in runs))
    yield Line("data", tuple(Cell(", ".join(_data_names(run)) or ABSENT) for run in runs))
    yield Line("steps", tuple(_cell(run.last_step, lambda v: f"{v:,.0f}") for run in runs))
    numbers: tuple[tuple[str, Callable[[RunRecord], float | None], Callable[..., str]], ...] = (
        ("epochs", lambda run: run.figure("epochs"), figure),
        ("time", lambda run: run.figure("runtime_seconds") or trained_seconds(run), duration),
        ("tokens per second", speed, figure),
        ("trained parameters", lambda run: run.figure("trained_parameters"), short_count),
        ("peak memory", lambda run: run.figure("peak_memory_bytes"), size),
        ("training loss", _train_loss, figure),
    )
    for name, read, write in numbers:
        cells = tuple(_cell(read(run), write) for run in runs)
        if any(cell.value is not None for cell in cells):
            yield Line(name, cells)
    yield from _validations(runs)
    yield from _metrics(runs)


def _train_loss(run: RunRecord) -> float | None:
    """None of a run with rewards: the loss of policies says nothing."""
    return None if run.measure == "reward" else run.figure("train_loss")


def _cell(value: float | None, write: Callable[..., str]) -> Cell:
    return Cell(ABSENT) if value is None else Cell(write(value), float(value))


def _data_names(run: RunRecord) -> list[str]:
    return [clean(Path(source).name) for source in sources_of(run)]


def _validations(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """The best figure of each kind on held-out rows, and the loss before training."""
    rows = {(_data_of(run), _split_of(run), run.recipe.get("objective.name")) for run in runs}
    tokens = {_tokenizer_of(run) for run in runs}
    for name in MAIN:
        measured = [_points(run, "evaluation", name) for run in runs]
        # Losses are per token; what is a share of rows does not depend on the tokenizer.
        is_same = len(rows) == 1 and (len(tokens) == 1 or name != "loss")
        best = [best_of(points, name) for points in measured]
        if not any(best):
            continue
        what = f"validation {TITLES[name].lower()}"
        before = (points[0][1] if points and points[0][0] == 0 else None for points in measured)
        yield Line(f"{what} before", tuple(_cell(value, figure) for value in before))
        cells = tuple(_cell(each[0][1] if each else None, figure) for each in best)
        better: Better = "lower" if name == "loss" else "higher"
        yield Line(f"best {what}", cells, better if is_same else "neither")


def _points(run: RunRecord, kind: str, name: str) -> tuple[tuple[float, float], ...]:
    """A figure of a run's events; no loss of a run with rewards."""
    if name == "loss" and run.measure == "reward":
        return ()
    return points_of(run.of_kind(kind), name)


def _metrics(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """The metrics of evaluations on the same data."""
    found = [_evaluations(run) for run in runs]
    for label in dict.fromkeys(label for each in found for label in each):
        evaluations = [each.get(label) for each in found]
        models = [each.model("after") if each else None for each in evaluations]
        has_same_rows = len({_rows_of(each) for each in evaluations if each}) == 1
        names = dict.fromkeys(name for model in models if model for name in model.scores)
        for name in names:
            scores = [model.scores.get(name) if model else None for model in models]
            known = [score for score in scores if score is not None]
            # Scores with other signatures are other metrics: none of them is best.
            is_same = has_same_rows and len({score.signature for score in known}) == 1
            yield Line(
                metric_name(name),
                tuple(
                    Cell(figure(score.value), score.value, score.low, score.high)
                    if score
                    else Cell(ABSENT)
                    for score in scores
                ),
                known[0].better if is_same else "neither",
                clean(label),
            )


def _evaluations(run: RunRecord) -> dict[str, Evaluation]:
    """The newest evaluation of the tuned model on each data set."""
    found: dict[str, Evaluation] = {}
    for evaluation in run.evaluations:
        if evaluation.model("after") is not None:
            found.setdefault(evaluation.label, evaluation)
    return found


def _rows_of(evaluation: Evaluation) -> tuple[str, int]:
    """What tells whether two evaluations asked the same rows."""
    fingerprint = evaluation.data.get("fingerprint")
    if fingerprint is None:
        texts = repr([(row.prompt, row.label) for row in evaluation.rows])
        fingerprint = sha256(texts.encode("utf-8", "replace")).hexdigest()
    return str(fingerprint), evaluation.num_rows


# What does not compare


def _warnings(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    unfinished = [name for name, run in zip(names, runs, strict=True) if not run.is_finished]
    if unfinished:
        yield f"not finished: {', '.join(unfinished)}"
    for text, read in (
        ("other training or validation data", _data_of),
        ("other tokenizers: losses are of other tokens", _tokenizer_of),
        ("another split of the rows held out", _split_of),
    ):
        groups: dict[object, list[str]] = {}
        for name, run in zip(names, runs, strict=True):
            groups.setdefault(read(run), []).append(name)
        if len(groups) > 1:
            sides = " | ".join(", ".join(group) for group in groups.values())
            yield f"{text} ({sides}): their figures do not compare"
    yield from _other_rows(runs)


DATA_SETTINGS = ("base model", "chat template", "tokenizer", "version of the store", "settings of")
"""Fingerprints that are not of rows."""


def _data_of(run: RunRecord) -> object:
    """Hashes of the data; the names of its files where the run has no checkpoint."""
    hashes = {
        value
        for name, value in run.fingerprints.items()
        if not name.removeprefix("validation: ").startswith(DATA_SETTINGS)
    }
    return frozenset(hashes) if hashes else tuple(sources_of(run))


def _tokenizer_of(run: RunRecord) -> object:
    return run.fingerprints.get("tokenizer") or run.recipe.get("model.id")


def _split_of(run: RunRecord) -> object:
    return str(run.recipe.get("data.validation")), run.recipe.get("train.seed")


def _other_rows(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Evaluations that share a name and not their rows."""
    prints: dict[str, set[tuple[str, int]]] = {}
    for run in runs:
        for label, evaluation in _evaluations(run).items():
            prints.setdefault(label, set()).add(_rows_of(evaluation))
    for label, found in prints.items():
        if len(found) > 1:
            yield f"evaluations of {clean(label)} are of other rows: their scores do not compare"


# The page


def write_comparison(comparison: RunComparison, out: Path) -> Path:
    """Writes the comparison as one page.

    Raises:
        DiskError: it cannot be written (`disk.write`).
    """
    contents = {"comparison": comparison, "drawings": drawings_of(comparison)}
    return write_page(render("compare.html.jinja", contents), out)


def drawings_of(comparison: RunComparison) -> list[Drawing]:
    """Each figure's curves of all runs in one chart; beyond eight runs colors come again."""
    found: list[Drawing | None] = []
    for kind, suffix in (("evaluation", "validation"), ("step", "training, smoothed")):
        for name in MAIN:
            series = tuple(
                Series(run_name, smoothed(points) if kind == "step" else points, color, look)
                for color, run_name, points, look in _lines(comparison, kind, name)
            )
            found.append(draw(Chart(f"{TITLES[name]}, {suffix}", series, about=suffix)))
    return [drawing for drawing in found if drawing is not None]


def _lines(
    comparison: RunComparison, kind: str, name: str
) -> Iterator[tuple[int, str, tuple[tuple[float, float], ...], Any]]:
    for index, (run_name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True)):
        points = _points(run, kind, name)
        if points:
            look = "dots" if kind == "evaluation" else "line"
            yield index % MOST_COLORS + 1, run_name, points, look
