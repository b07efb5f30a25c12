"""`tunesmith report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tunesmith.evaluate.report.page import write_report
from tunesmith.evaluate.report.reading import read_run
from tunesmith.evaluate.report.verdict import verdict_of
from tunesmith.evaluate.report.wording import size


def run_report(run: str, *, out: str | None) -> None:
    """Writes the report of a run, and says its first sentence."""
    console = Console()
    folder = Path(run)
    page = write_report(folder, Path(out) if out else None)
    console.print(verdict_of(read_run(folder)).text, highlight=False, markup=False)
    shown = f"report: {page} ({size(page.stat().st_size)})"
    console.print(shown, highlight=False, markup=False, soft_wrap=True)
