"""The report of a run: one page, made of nothing but the run directory's files."""

from tunesmith.evaluate.report.page import write_report

__all__ = ["write_report"]
