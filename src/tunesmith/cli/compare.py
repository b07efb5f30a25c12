"""`tunesmith compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.evaluate.compare import Line, RunComparison, compare_runs, write_comparison

NAME_WIDTH, RUN_WIDTH = 34, 22
"""Characters of a terminal that the names of figures take, and at least one run."""


def run_compare(runs: Sequence[str], *, out: str | None, as_json: bool) -> None:
    """Prints runs side by side, and writes them as a page if asked for."""
    comparison = compare_runs([Path(run) for run in runs])
    if out is not None:
        write_comparison(comparison, Path(out))
    if as_json:
        # Not through rich, which would fold long lines.
        print(json.dumps(comparison.as_json(), indent=1, ensure_ascii=False))  # noqa: T201
        return
    console = Console()
    show_comparison(console, comparison)
    if out is not None:
        console.print(f"page: {out}", highlight=False, markup=False, soft_wrap=True)


def show_comparison(console: Console, comparison: RunComparison) -> None:
    """Prints warnings, results, and settings that differ."""
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    num_columns = max(1, (console.width - NAME_WIDTH) // RUN_WIDTH)
    for first in range(0, len(comparison.runs), num_columns):
        shown = range(first, min(first + num_columns, len(comparison.runs)))
        console.print(_table("Results", comparison.names, comparison.results, shown))
        if comparison.settings:
            title = "What differs in the recipes"
            console.print(_table(title, comparison.names, comparison.settings, shown))
    if not comparison.settings:
        console.print("nothing differs in the recipes")
    if any(line.best for line in comparison.results):
        console.print("★ best; ☆ best, but its 95 % interval overlaps another one", style="dim")


def _table(title: str, names: Sequence[str], lines: Sequence[Line], shown: Sequence[int]) -> Table:
    """A column for each of the runs shown; metrics under the data they were measured on."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for index in shown:
        table.add_column(escape(names[index]), overflow="fold")
    group = ""
    for line in lines:
        if line.group != group:
            group = line.group
            table.add_section()
            table.add_row(f"[bold]{escape(group)}[/bold]")
        table.add_row(escape(line.name), *(_text(line, index) for index in shown))
    return table


def _text(line: Line, index: int) -> str:
    cell = line.cells[index]
    text = escape(cell.text)
    if cell.low is not None and cell.high is not None:
        text += f" [dim]({cell.low:.3g} to {cell.high:.3g})[/dim]"
    if index in line.best:
        text = f"[green]{text} {'★' if line.is_clear else '☆'}[/green]"
    return text
