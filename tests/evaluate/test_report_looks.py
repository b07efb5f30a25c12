"""How pages look: colors that can be read, and a real browser where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from report_runs import four_rows, ordinary_run, row, write_evaluation
from tunesmith.evaluate.compare import compare_runs, write_comparison
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.report.page import PAGES

STYLE = (PAGES / "style.css").read_text(encoding="utf-8")


def colors(theme: str) -> dict[str, str]:
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    found = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", blocks[0]))
    if theme == "dark":
        found |= dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", blocks[1]))
    return found


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_can_be_read(theme: str) -> None:
    known = colors(theme)
    for text in ("text", "muted", "good", "bad", "warn", "c1"):
        for ground in ("page", "card"):
            assert contrast(known[text], known[ground]) >= 4.5, (text, ground)
    for ground in ("extra", "missing", "other"):
        assert contrast(known["text"], known[ground]) >= 4.5, ground
    for line in range(1, 9):  # lines and dots need 3 to 1
        assert contrast(known[f"c{line}"], known["page"]) >= 3, line


def test_themes_and_paper_are_provided_for() -> None:
    assert "@media screen and (prefers-color-scheme: dark)" in STYLE  # paper stays white
    assert "@media print" in STYLE
    assert "@media (max-width: 40rem)" in STYLE
    assert ":focus-visible" in STYLE


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("error", event => parent.postMessage("failed: " + event.message, "*"));
addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const plot = document.querySelector(".plot");
  plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  const width = document.documentElement.scrollWidth;
  parent.postMessage(`${width <= innerWidth ? "fits" : "wide"} ${plot.innerText}`, "*");
});
</script>"""
FRAME = """<iframe src="page.html" width="390" height="800"></iframe>
<script>onmessage = event => { document.title += event.data; };</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_a_phone_shows_it_without_scrolling_sideways(kind: str, tmp_path: Path) -> None:
    run = ordinary_run(tmp_path / "a-run-with-a-rather-long-name-that-nobody-would-break-well")
    long = row(9, "长" * 900, "word" * 300, "https://example.org/" + "path/" * 90)
    write_evaluation(run, [*four_rows(), long])
    page = tmp_path / "page.html"
    if kind == "report":
        write_report(run, page)
    else:
        write_comparison(compare_runs([run, run, run]), page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,900", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None
    assert title[1].startswith("fits") and "step 0" in title[1], title[1]
