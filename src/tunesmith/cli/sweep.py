"""`tunesmith sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tunesmith.cli.console import format_seconds, quiet_libraries
from tunesmith.config.load import LoadedRecipe, load_recipe
from tunesmith.types import Event, Json


def run_sweep(recipe: str, overrides: Sequence[str], *, trials: int | None, restart: bool) -> None:
    """Searches for the best values, and shows what was found."""
    console = Console()
    more = [f"sweep.trials={trials}"] if trials is not None else []
    loaded = load_recipe(recipe, [*overrides, *more])
    with console.status("Starting ..."):
        from tunesmith.sweep.run import search

        quiet_libraries()
    display = SweepDisplay(console, loaded)
    try:
        outcome = search(loaded, Path(recipe), display, restart=restart)
    finally:
        display.close()
    show_outcome(console, outcome)


class SweepDisplay:
    """Shows trials as they begin and end, with a bar of steps for each that is at work."""

    def __init__(self, console: Console, loaded: LoadedRecipe) -> None:
        self.console = console
        self.metric = loaded.recipe.sweep.metric if loaded.recipe.sweep else "loss"
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[int, Any] = {}

    def begun(self, number: int, values: dict[str, Json]) -> None:
        """Says what a trial is given."""
        self.progress.start()
        said = "  ".join(f"{key}={_value(value)}" for key, value in values.items())
        self.console.print(f"trial {number}: {said}", highlight=False)

    def told(self, number: int, event: Event) -> None:
        """Moves the trial's bar."""
        if event.kind == "start":
            total = int(str(event.data["num_steps"]))
            self.tasks[number] = self.progress.add_task(
                f"trial {number}", total=total, completed=event.step, text=""
            )
        elif number in self.tasks and event.kind == "step":
            self.progress.update(self.tasks[number], completed=event.step)
        elif number in self.tasks and event.kind == "evaluation":
            text = f"{self.metric} {_value(event.data.get(self.metric))}"
            self.progress.update(self.tasks[number], text=text)

    def ended(self, number: int, state: str, value: float | None, why: str) -> None:
        """Says what became of a trial."""
        if number in self.tasks:
            self.progress.remove_task(self.tasks.pop(number))
        reached = f" {self.metric} {_value(value)}" if value is not None else ""
        reason = f" ({why})" if why else ""
        self.console.print(
            f"trial {number}: {state}{reached}{reason}", highlight=False, markup=False
        )

    def close(self) -> None:
        """Ends the bars."""
        self.progress.stop()


def show_outcome(console: Console, outcome: Any) -> None:
    """Prints the trials, best first, and where the best recipe is."""
    keys = list(dict.fromkeys(key for row in outcome.rows for key in row.values))
    table = Table("trial", *keys, outcome.metric, "steps", "time", "state")
    for row in outcome.rows:
        style = "bold green" if row.number == outcome.best else None
        figures = (
            "-" if row.value is None else _value(row.value),
            str(row.steps or "-"),
            format_seconds(row.seconds) if row.seconds else "-",
            row.state,
        )
        values = [_value(row.values.get(key)) for key in keys]
        table.add_row(str(row.number), *values, *figures, style=style)
    console.print(table)
    if outcome.importances:
        shares = ", ".join(f"{key} {share:.2f}" for key, share in outcome.importances.items())
        console.print(f"importance for {outcome.metric}: {shares}", highlight=False)
    if outcome.best is None:
        console.print("no trial came to its end: the same command goes on", highlight=False)
        return
    best = f"{outcome.folder}/trial-{outcome.best:03d}/model"
    console.print(
        f"best: trial {outcome.best}, its model is in {best}\n"
        f"its recipe: tunesmith train {outcome.folder / 'best.yaml'}   picture: "
        f"{outcome.folder / 'sweep.png'}",
        highlight=False,
    )


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
