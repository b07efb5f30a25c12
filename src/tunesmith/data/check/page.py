"""The report as a page: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from tunesmith.data.check.findings import ADVICE
from tunesmith.data.check.report import CheckReport
from tunesmith.io.atomic import write_atomic


def write_page(report: CheckReport, path: Path) -> None:
    """Writes the report as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    bars = report.histogram()
    page = environment.get_template("page.html.jinja").render(
        report=report,
        findings=sorted(
            report.findings.counts.items(),
            key=lambda item: (not report.findings.is_error(item[0]), -item[1]),
        ),
        advice=ADVICE,
        bars=bars,
        highest=max((count for _, _, count in bars), default=1),
    )
    write_atomic(path, page)
