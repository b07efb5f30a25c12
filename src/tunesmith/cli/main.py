"""The `tunesmith` command; a command's module loads when it is called: --help needs no torch."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import __version__
from tunesmith.cli import prove, ship
from tunesmith.cli.arguments import Overrides, RecipePath
from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.io.cache import cache_folder
from tunesmith.io.redact import redact, redacted_traceback

app = typer.Typer(
    name="tunesmith",
    help="Turn a pretrained language model into a specialist on your own data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train anew; an earlier run is kept aside.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on even if recipe or data have changed."),
    ] = False,
    auto_restart: Annotated[
        int,
        typer.Option(
            "--auto-restart",
            min=0,
            metavar="N",
            help="Start again after a crash while it gets further, at most N times.",
        ),
    ] = 0,
) -> None:
    """Fine-tune a model by a recipe; run again, it goes on where it stopped."""
    from tunesmith.cli.supervise import end_with_supervisor, own_arguments, run_supervised

    if auto_restart:
        from tunesmith.config.load import load_recipe

        output = Path(load_recipe(recipe, overrides or []).recipe.output)
        raise typer.Exit(run_supervised(own_arguments(sys.argv[1:]), output, restarts=auto_restart))
    end_with_supervisor()
    from tunesmith.cli.train import run_train

    run_train(recipe, overrides or [], restart=restart, allow_changes=allow_changes)


@app.command()
def preview(
    recipe: Annotated[
        str, typer.Argument(help="The recipe (YAML), or a data file.", metavar="RECIPE|DATA")
    ],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many.")] = 3,
) -> None:
    """Show the first samples token by token, as the model will see them."""
    from tunesmith.cli.preview import run_preview

    run_preview(recipe, overrides or [], num_samples=samples)


@app.command()
def check(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, hub ids, or a recipe; KEY.PATH=VALUE as for train.",
            metavar="DATA...",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose tokenizer and template count.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="Held-out data, to find leaks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[
        str | None, typer.Option("--html", help="Write the report as a page.", metavar="OUT")
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(
            "--fix",
            help="Write a cleaned copy (.jsonl, .csv, .xlsx) and a list of what was left out.",
            metavar="OUT",
        ),
    ] = None,
) -> None:
    """Look at data: what is in it, what is wrong with it, and where."""
    from tunesmith.cli.check import run_check

    run_check(data, model=model, validation=validation, as_json=as_json, html=html, fix=fix)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Show steps, tokens, resolved values, time and memory, without training."""
    from tunesmith.cli.plan import run_plan

    run_plan(recipe, overrides or [])


@app.command()
def quickstart(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Run directory.")
    ] = "runs/quickstart",
    restart: Annotated[bool, typer.Option("--restart", help="Train anew.")] = False,
) -> None:
    """Fine-tune the built-in model on a small task and show the difference."""
    from tunesmith.cli.quickstart import run_quickstart

    run_quickstart(output, restart=restart)


for command in (
    *(prove.predict, prove.evaluate, prove.report, prove.compare, prove.sweep),
    *(ship.export, ship.chat, ship.score),
):
    app.command()(command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Runs the command line; errors print without a traceback and exit with their code."""
    is_debug = "--debug" in sys.argv
    try:
        app()
    except Interrupted as stop:
        typer.echo(redact(f"\n{stop}"), err=True)
        sys.exit(128 + stop.signal_number)
    except TunesmithError as error:
        if is_debug:
            typer.echo(redacted_traceback(error), err=True)
        typer.echo(redact(str(error)), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("\nstopped; nothing of a run is lost", err=True)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the command line is where all errors end
        typer.echo(_tell_crash(error, is_debug=is_debug), err=True)
        sys.exit(1)


def _tell_crash(error: Exception, *, is_debug: bool) -> str:
    """What is said of an error that nobody foresaw; its traceback is kept in a file."""
    text = redacted_traceback(error)
    where = "run again with --debug to see where"
    with suppress(OSError):
        file = cache_folder("crashes") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        file.write_text(f"{redact(shlex.join(sys.argv))}\n\n{text}", encoding="utf-8")
        where = f"where: {file}"
    said = redact(f"{type(error).__name__}: {error}")
    return f"{text if is_debug else ''}\ninternal error: {said}\n  {where}; please report it"
