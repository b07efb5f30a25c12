"""The report as a page: whole, alone, and safe whatever the data holds."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from tunesmith.data.check.page import write_page
from tunesmith.data.check.report import CheckReport, Cost, SourceReport
from tunesmith.errors import Problem

SCRIPT = "<script>alert('x')</script>"
VOID = {"meta", "rect", "br", "link", "img"}


class Outline(HTMLParser):
    """Checks that every element is closed, and collects names and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen = Counter[str]()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes one element's start."""
        self.seen[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes one closed element."""
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """Takes one element's end."""
        if tag not in VOID:
            assert self.open.pop() == tag


def report_with(*problems: Problem) -> CheckReport:
    report = CheckReport(template="t", tokenizer=SCRIPT)
    report.sources = [SourceReport(SCRIPT, 2, samples=3, unusable=1), SourceReport("v", 1, True)]
    report.kinds["Conversation"] = 3
    report.roles.update({"user": 3, SCRIPT: 1})
    report.languages[SCRIPT] = 1
    report.notes[SCRIPT] = 2
    report.facts.append(SCRIPT)
    report.lengths = np.asarray([3, 40, 500])
    report.supervised = np.asarray([1, 20, 100])
    for problem in problems:
        report.findings.add(problem)
    return report


def page_of(report: CheckReport, folder: Path) -> tuple[str, Outline]:
    write_page(report, folder / "made" / "page.html")
    page = (folder / "made" / "page.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert not outline.open
    return page, outline


def test_a_page_without_anything_from_outside(tmp_path: Path) -> None:
    page, outline = page_of(report_with(), tmp_path)
    assert page.startswith("<!doctype html>")
    assert not outline.attributes & {"src", "href", "onclick"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert outline.seen["svg"] == 1
    assert outline.seen["rect"] >= 3
    assert "Nothing wrong was found." in page


def test_whatever_the_data_holds_is_text(tmp_path: Path) -> None:
    problem = Problem(f"{SCRIPT}:1", "data.json", SCRIPT, SCRIPT)
    page, outline = page_of(report_with(problem), tmp_path)
    assert not outline.seen["script"]
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") >= 9


def test_findings_with_counts(tmp_path: Path) -> None:
    report = report_with(
        *(Problem(f"d:{n}", "data.json", "x", "y") for n in range(30)),
        Problem("d", "data.few-rows", "3 samples", "at least 50"),
    )
    report.cost = Cost(1, 543, 7200.0, "cpu")
    page, outline = page_of(report, tmp_path)
    assert outline.seen["details"] == 2
    assert "30 ×" in page
    assert "and 10 more" in page
    assert "1 ×" not in page
    assert "2 hours" in page
    assert "train 1 epoch on this cpu" in page
    assert "in 2 files" in page
    assert "1 unusable row<" in page


def test_no_samples(tmp_path: Path) -> None:
    _, outline = page_of(CheckReport(template="t", tokenizer="t"), tmp_path)
    assert not outline.seen["svg"]
