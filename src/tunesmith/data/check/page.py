"""The report as a page: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.data.check.findings import ADVICE, OF_ALL_ROWS
from tunesmith.data.check.report import CheckReport, contents, counted, spoken_time
from tunesmith.io.atomic import write_atomic


def write_page(report: CheckReport, path: Path) -> None:
    """Writes the report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    bars = report.histogram()
    page = environment.get_template("page.html.jinja").render(
        report=report,
        counted=counted,
        spoken_time=spoken_time,
        findings=report.findings,
        advice=ADVICE,
        of_all_rows=OF_ALL_ROWS,
        contents=contents(report),
        bars=bars,
        highest=max((count for _, _, count in bars), default=1),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page)
