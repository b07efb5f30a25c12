"""`tunesmith check`: what is in the data, and what is wrong with it, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunesmith.cli.console import ConsoleReporter, format_seconds, quiet_libraries
from tunesmith.config.auto import auto_epochs
from tunesmith.config.load import LoadedRecipe, load_recipe, recipe_with
from tunesmith.data.check.checker import Dropped, check_sources
from tunesmith.data.check.findings import ADVICE
from tunesmith.data.check.fix import write_fixed
from tunesmith.data.check.page import write_page
from tunesmith.data.check.report import CheckReport
from tunesmith.data.sources import Sources, find_sources
from tunesmith.data.templates import build_renderer
from tunesmith.errors import MAX_PROBLEMS, RecipeError
from tunesmith.model.device import find_device
from tunesmith.model.load import find_model, load_config, load_tokenizer
from tunesmith.model.memory import measure_config
from tunesmith.types import Json, Reporter

DEFAULT_MODEL = "builtin:smollm2-135m"
BAR_WIDTH = 40


def run_check(
    data: Sequence[str],
    *,
    model: str | None,
    validation: str | None,
    as_json: bool,
    html: str | None,
    fix: str | None,
) -> None:
    """Checks files, data sets or a recipe's data and prints what a person wants to know."""
    console = Console(stderr=as_json)
    loaded = load_data(data, model, validation)
    quiet_libraries()
    reporter = ConsoleReporter(console)
    sources = find_sources(loaded.recipe.data, loaded.locate, reporter)
    source = find_model(loaded.recipe.model, reporter, loaded.folder)
    renderer, template = build_renderer(load_tokenizer(source), loaded.recipe.data, loaded.folder)
    report, dropped = check_sources(
        sources, renderer, reporter, max_length=_max_length(loaded, reporter)
    )
    report.template, report.tokenizer = template, source.label
    if as_json:
        typer.echo(json.dumps(report.as_json(), ensure_ascii=False, indent=1))
    else:
        show_report(console, report)
        show_cost(console, report, loaded, reporter)
    if html:
        write_page(report, Path(html))
        console.print(f"page: {html}", highlight=False)
    if fix:
        _fix(console, sources, dropped, Path(fix))
    elif report.findings.num_errors and not as_json:
        console.print(
            "try: --fix clean.jsonl writes a copy without unusable and duplicate rows, and a list "
            "of what was left out",
            highlight=False,
        )
    if report.findings.num_errors and not fix:
        raise typer.Exit(2)


def load_data(
    data: Sequence[str], model: str | None = None, validation: str | None = None
) -> LoadedRecipe:
    """A recipe file, or a recipe around the data named; `key=value` overrides either.

    Raises:
        RecipeError: nothing to check is named.
    """
    overrides = [text for text in data if "=" in text and not Path(text).exists()]
    paths = [text for text in data if text not in overrides]
    if model:
        overrides.append(f"model={model}")
    if validation:
        overrides.append(f"data.validation={validation}")
    if len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml"):
        return load_recipe(paths[0], overrides)
    if not paths:
        raise RecipeError(
            "recipe.override", "command line", found="no data", expected="files, or a recipe"
        )
    tree: dict[str, Json] = {
        "model": DEFAULT_MODEL,
        "data": {"train": list(paths), "validation": 0},
    }
    return recipe_with(tree, overrides)


def _max_length(loaded: LoadedRecipe, reporter: Reporter) -> int:
    """The recipe's limit, or the model's context."""
    wanted = loaded.recipe.data.max_length
    if isinstance(wanted, int):
        return wanted
    config = load_config(find_model(loaded.recipe.model, reporter, loaded.folder))
    return measure_config(config, loaded.recipe.method).context_tokens


def show_report(console: Console, report: CheckReport) -> None:
    """Prints counts, the histogram, and the findings: the first in full, all by code."""
    console.print(
        f"{report.num_samples:,} samples, {report.num_tokens:,} tokens of {report.tokenizer}, "
        f"{100 * report.supervised_share:.0f} % supervised; template: {report.template}",
        highlight=False,
    )
    console.print(_overview(report))
    show_histogram(console, report)
    for note, count in report.notes.most_common():
        console.print(f"note: {count:,} samples: {note}", highlight=False, markup=False)
    for fact in report.facts:
        console.print(f"note: {fact}", highlight=False, markup=False)
    show_findings(console, report)


def _overview(report: CheckReport) -> Table:
    table = Table(show_header=False, title="Contents", title_justify="left")
    for source in report.sources:
        bad = f", [red]{source.unusable:,} unusable[/red]" if source.unusable else ""
        files = f" in {source.files} files" if source.files > 1 else ""
        table.add_row(escape(source.name), f"{source.samples:,} samples{files}{bad}")
    for name, counter in (
        ("kinds", report.kinds),
        ("roles", report.roles),
        ("answers in a sample", report.turns),
        ("languages", report.languages),
    ):
        if counter:
            shown = ", ".join(f"{key} {count:,}" for key, count in counter.most_common(8))
            table.add_row(name, escape(shown))
    shares = report.supervised_quantiles()
    if shares:
        shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        table.add_row("supervised of a sample", shown)
    return table


def show_histogram(console: Console, report: CheckReport) -> None:
    """Bars of token lengths."""
    bars = list(dropwhile(lambda bar: not bar[2], report.histogram()))
    if not bars:
        return
    highest = max(count for _, _, count in bars)
    quantiles = ", ".join(f"{name} {value:,}" for name, value in report.quantiles().items())
    console.print(f"tokens of a sample ({quantiles}):", highlight=False)
    for start, stop, count in bars:
        length = round(8 * BAR_WIDTH * count / highest)
        bar = "█" * (length // 8) + (" ▏▎▍▌▋▊▉"[length % 8] if length % 8 else "")
        if count and not bar:
            bar = "▏"
        label = f"{start:>7,} to {stop - 1:>7,}"
        console.print(f"{label} {bar} {count or ''}", highlight=False)


def show_findings(console: Console, report: CheckReport) -> None:
    """The first findings in full, errors before warnings, then totals by code."""
    findings = report.findings
    if not findings.counts:
        console.print("[green]nothing wrong was found[/green]")
        return
    codes = sorted(findings.counts, key=lambda c: (not findings.is_error(c), -findings.counts[c]))
    each = max(2, MAX_PROBLEMS // len(codes))
    for code in codes:
        for problem in findings.first[code][:each]:
            console.print(str(problem), highlight=False, markup=False, soft_wrap=True)
    table = Table("code", "rows", "", title="Findings", title_justify="left")
    for code in codes:
        color = "red" if findings.is_error(code) else "yellow"
        advice = ADVICE.get(code, "cannot be trained on")
        table.add_row(f"[{color}]{code}[/{color}]", f"{findings.counts[code]:,}", advice)
    console.print(table)


def show_cost(
    console: Console, report: CheckReport, loaded: LoadedRecipe, reporter: Reporter
) -> None:
    """What a training on this data would take, roughly."""
    asked = loaded.recipe.train.epochs
    epochs = auto_epochs(max(report.num_samples, 1))[0] if isinstance(asked, str) else asked
    tokens = epochs * report.num_tokens
    config = load_config(find_model(loaded.recipe.model, reporter, loaded.folder))
    sizes, device = measure_config(config, loaded.recipe.method), find_device()
    # 2 for the forward, 2 for the gradient of activations, 2 more for that of trained weights.
    work = (4 * sizes.num_parameters + 2 * sizes.num_trained) * tokens
    rate = device.measure_flops()
    if not report.num_tokens:
        return
    console.print(
        f"training on it: {epochs} epochs, {tokens:,} tokens, very roughly "
        f"{format_seconds(work / rate)} on this {device.kind} (`tunesmith plan` measures it)",
        highlight=False,
    )


def _fix(console: Console, sources: Sources, dropped: Dropped, path: Path) -> None:
    fixed = write_fixed(sources.train, dropped, path)
    console.print(
        f"{fixed.kept:,} rows kept: {fixed.path}; {fixed.dropped:,} left out, each with its "
        f"reason: {fixed.list_path}",
        highlight=False,
    )
