"""`tunesmith score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunesmith.cli.check import load_data
from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.cli.evaluate_view import score_text
from tunesmith.data.sources import find_sources
from tunesmith.evaluate.metrics.classification import ClassReport
from tunesmith.evaluate.score import (
    ScoredRow,
    class_scores,
    class_table,
    score_sources,
    summary,
)
from tunesmith.infer.score_model import open_score_model
from tunesmith.io.atomic import write_atomic

SHOWN_ROWS = 5
SHOWN_CHARACTERS = 60


def run_score(target: str, data: Sequence[str], *, out: str | None) -> None:
    """Scores the rows of data, prints the first ones and the summary, and writes all of them."""
    quiet_libraries()
    console = Console()
    reporter = ConsoleReporter(Console(stderr=True))
    loaded = load_data(data)
    recipe = loaded.recipe
    sources = find_sources(recipe.data, loaded.locate, reporter).train
    scorer = open_score_model(target, reporter)
    rows = score_sources(scorer, sources, recipe.data, reporter)
    console.print(_table(rows))
    scores = class_scores(rows)
    for score in scores:
        console.print(f"{score.name.replace('_', ' ')}: {score_text(score)}", highlight=False)
    for name, value in summary(rows).items():
        if name in {score.name for score in scores}:
            continue
        shown = f"{value:,.0f}" if name == "rows" else f"{value:,.4f}"
        console.print(f"{name.replace('_', ' ')}: {shown}", highlight=False)
    by_class = class_table(rows)
    if by_class is not None:
        console.print(_class_table(by_class))
    if out is not None:
        lines = (json.dumps(row.as_json(), ensure_ascii=False) for row in rows)
        write_atomic(Path(out), "".join(f"{line}\n" for line in lines))
        console.print(f"all rows: {out}", highlight=False, soft_wrap=True)


def _table(rows: Sequence[ScoredRow]) -> Table:
    """The first rows."""
    table = Table(title=f"The first {min(SHOWN_ROWS, len(rows))} rows", title_justify="left")
    shown = rows[:SHOWN_ROWS]
    columns = [name for name in NAMES if any(name in row.values for row in shown)]
    for name in ("line", "text", *columns):
        table.add_column(name)
    for row in shown:
        text = " ".join(row.text.split())
        text = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
        table.add_row(str(row.origin.line), text, *(_cell(row, name) for name in columns))
    return table


def _class_table(report: ClassReport) -> Table:
    """Figures of each label, and what it was taken for."""
    table = Table(title="By label", title_justify="left")
    for name in ("label", "rows", "precision", "recall", "F1", "answered as"):
        table.add_column(name)
    for place, label in enumerate(report.labels):
        counts = zip(report.labels, report.confusion[place], strict=False)
        taken = sorted(((n, other) for other, n in counts if n), reverse=True)
        figures = (report.precision[place], report.recall[place], report.f1[place])
        table.add_row(
            label,
            str(report.support[place]),
            *(f"{figure:.3f}" for figure in figures),
            ", ".join(f"{other} {count}" for count, other in taken),
        )
    return table


NAMES = ("score", "chosen", "rejected", "right", "label", "probabilities", "expected")


def _cell(row: ScoredRow, name: str) -> str:
    value = row.values.get(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"{max(float(str(each)) for each in value.values()):.3f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value or "")
