"""`tunesmith train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunesmith.cli.console import ConsoleReporter, RunDisplay, quiet_libraries, show_summary
from tunesmith.config.heads import ClassifyConfig, RewardConfig
from tunesmith.config.load import LoadedRecipe, load_recipe
from tunesmith.types import Event, Json


def run_train(
    recipe: str, overrides: Sequence[str], *, restart: bool, allow_changes: bool = False
) -> None:
    """Trains by a recipe file and prints what a person wants to know."""
    console = Console()
    loaded = load_recipe(recipe, overrides)
    train_and_show(loaded, console, restart=restart, allow_changes=allow_changes)
    output = loaded.recipe.output
    hint = f"measure it: tunesmith evaluate {output}   talk to it: tunesmith chat {output}"
    if isinstance(loaded.recipe.objective, RewardConfig | ClassifyConfig):
        hint = f"try it: tunesmith score {output} data.jsonl"
    console.print(hint, highlight=False, soft_wrap=True)


def train_and_show(
    loaded: LoadedRecipe, console: Console, *, restart: bool, allow_changes: bool = False
) -> dict[str, Json]:
    """Trains with bars and tables; returns the summary."""
    with console.status("Starting ..."):
        from tunesmith.train import train

        quiet_libraries()
    display = RunDisplay(console)

    def listen(event: Event) -> None:
        if event.kind == "start":
            show_start(console, event)
        display(event)

    was_finished = (Path(loaded.recipe.output) / "summary.json").exists() and not restart
    try:
        run, summary = train(
            loaded,
            restart=restart,
            allow_changes=allow_changes,
            reporter=ConsoleReporter(console),
            listeners=[listen],
        )
    finally:
        display.close()
    if was_finished:
        console.print(f"{run.path} is finished already (--restart trains anew)", highlight=False)
    show_summary(console, summary)
    report = run.path / "report.html"
    console.print(f"result: {run.model}   report: {report}", highlight=False, soft_wrap=True)
    return summary


def show_start(console: Console, event: Event) -> None:
    """Prints what the run will do: data, notes, and every resolved value with its reason."""
    data = event.data
    console.print(str(data["overview"]), highlight=False)
    notes = data["notes"]
    for note in notes if isinstance(notes, list) else []:
        console.print(f"note: {note}", highlight=False)
    values, reasons = data["auto"], data["reasons"]
    if isinstance(values, dict) and isinstance(reasons, dict) and reasons:
        console.print(auto_table(values, reasons))


def auto_table(values: dict[str, Json], reasons: dict[str, Json]) -> Table:
    """Chosen values with their reasons."""
    table = Table("chosen", "value", "because", title="Values for `auto`", title_justify="left")
    for key, reason in reasons.items():
        table.add_row(key, str(values.get(key)), str(reason))
    return table
