"""The report of `tunesmith check` on a terminal: short, and readable on 80 columns."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.data.check.findings import ADVICE, OF_ALL_ROWS, Findings
from tunesmith.data.check.report import (
    CheckReport,
    SourceReport,
    contents,
    counted,
    named,
    spoken_time,
)
from tunesmith.errors import Problem

NUM_BARS, BAR_WIDTH = 10, 40


def show_report(console: Console, report: CheckReport) -> None:
    """Prints counts, the histogram, and the findings: the first in full, all by code."""
    table = Table.grid(padding=(0, 2))
    for source in report.sources:
        table.add_row("validation" if source.is_held_out else "data", _source(source))
    tokens = f"{report.num_tokens:,} of {report.tokenizer}"
    table.add_row("tokens", escape(f"{tokens}, {report.supervised_share:.0%} supervised"))
    table.add_row("template", escape(report.template))
    for name, text in contents(report):
        table.add_row(name, escape(text))
    for note, count in report.notes.most_common():
        table.add_row("note", escape(f"{counted(count, 'sample')}: {note}"))
    for fact in report.facts:
        table.add_row("note", escape(fact))
    console.print(table, highlight=False)
    show_histogram(console, report)
    show_findings(console, report.findings)


def _source(source: SourceReport) -> str:
    files = f" in {counted(source.files, 'file')}" if source.files > 1 else ""
    bad = f", [red]{counted(source.unusable, 'unusable row')}[/red]" if source.unusable else ""
    return f"{escape(source.name)}: {counted(source.samples, 'sample')}{files}{bad}"


def show_histogram(console: Console, report: CheckReport) -> None:
    """Bars of token lengths; empty bars between full ones are one line."""
    bars = report.histogram(NUM_BARS)
    if not bars:
        return
    highest = max(count for _, _, count in bars)
    console.print(f"\ntokens of a sample: {named(report.quantiles())}", highlight=False)
    for is_empty, run in groupby(bars, lambda bar: not bar[2]):
        if is_empty:
            console.print(f"{'...':>20}", highlight=False)
            continue
        for start, stop, count in run:
            label = f"{start:>8,} to {stop - 1:>8,}"
            console.print(f"{label} {_bar(count / highest)} {count:,}", highlight=False)


def _bar(share: float) -> str:
    eighths = max(1, round(8 * BAR_WIDTH * share))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def show_findings(console: Console, findings: Findings) -> None:
    """The first findings in full, errors before warnings, then totals by code."""
    if not findings.counts:
        console.print("\n[green]nothing wrong was found[/green]")
        return
    console.print()
    for problem in findings.examples():
        console.print(_line(problem, findings), soft_wrap=True, highlight=False)
    codes = findings.codes()
    parts = (
        (
            "red",
            "cannot be used: training stops, or drops them (data.bad_rows: drop)",
            True,
        ),
        ("yellow", "worth a look", False),
    )
    for color, title, is_error in parts:
        chosen = [code for code in codes if findings.is_error(code) == is_error]
        if chosen:
            console.print(f"\n[{color}]{title}[/{color}]", highlight=False)
            console.print(_totals(findings, chosen), highlight=False)


def _line(problem: Problem, findings: Findings) -> Text:
    """A problem as every error is written, with paths as they look from here."""
    where, found = (text.replace(f"{Path.cwd()}/", "") for text in (problem.where, problem.found))
    line = Text(f"{where}: ")
    line.append(problem.code, style="red" if findings.is_error(problem.code) else "yellow")
    return line.append(f": found {found}; expected {problem.expected}")


def _totals(findings: Findings, codes: list[str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for code in codes:
        count = "" if code in OF_ALL_ROWS else f"{findings.counts[code]:,}"
        table.add_row(f"  {code}", count, ADVICE.get(code, ""))
    return table


def show_cost(console: Console, report: CheckReport) -> None:
    """What a training on this data would take."""
    cost = report.cost
    if cost is not None:
        console.print(
            f"\ntraining: {counted(cost.epochs, 'epoch')}, {cost.tokens:,} tokens, very roughly "
            f"{spoken_time(cost.seconds)} on this {cost.device} (`tunesmith plan` measures it)",
            highlight=False,
        )
