"""The report page: one HTML file that needs nothing else; its template escapes everything."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tunesmith.evaluate.report.answers import answer_table, hard_samples, sample_rows
from tunesmith.evaluate.report.curves import curves_of
from tunesmith.evaluate.report.diagnosis import diagnose
from tunesmith.evaluate.report.evaluations import Evaluation, newest_with
from tunesmith.evaluate.report.facts import (
    commands_of,
    data_facts,
    environment_of,
    files_of,
    happenings,
    notes_of,
    settings_of,
    validations,
)
from tunesmith.evaluate.report.metrics_table import metric_rows
from tunesmith.evaluate.report.reading import RunRecord, read_run
from tunesmith.evaluate.report.shapes import text_of
from tunesmith.evaluate.report.verdict import tiles_of, verdict_of
from tunesmith.evaluate.report.wording import clean, counted, figure, percent
from tunesmith.io.atomic import write_atomic

MOST_EVALUATIONS = 8
PAGES = Path(__file__).parent / "page"


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes a run's report: a pure function of the files in its directory.

    Files that are missing, torn or of another shape leave out what they would have told.

    Args:
        folder: the run directory.
        out: where it goes; None takes `report.html` in the run directory.

    Returns:
        where it is.

    Raises:
        RunError: the folder is no run directory (`run.none`).
        DiskError: the page cannot be written (`disk.write`).
    """
    page = render("report.html.jinja", contents_of(read_run(folder)))
    return write_page(page, out or folder / "report.html")


def contents_of(run: RunRecord) -> dict[str, Any]:
    """Everything that the report's template shows."""
    evaluation = newest_with(run.evaluations)
    folder = str(run.folder)
    return {
        "run": run,
        "model": clean(text_of(run.start.get("model")) or text_of(run.recipe.get("model.id"))),
        "verdict": verdict_of(run),
        "tiles": tiles_of(run),
        "evaluation": evaluation,
        "metrics": metric_rows(evaluation) if evaluation else [],
        "others": [
            (clean(each.label), each, metric_rows(each))
            for each in run.evaluations[:MOST_EVALUATIONS]
            if each is not evaluation and each.models
        ],
        "effect": effect_of(evaluation) if evaluation else [],
        "notes": [clean(note) for note in evaluation.notes] if evaluation else [],
        "table": answer_table(evaluation) if evaluation else None,
        "samples": sample_rows(run),
        "curves": curves_of(run),
        "validations": validations(run),
        "happenings": happenings(run),
        "findings": diagnose(run),
        "data": data_facts(run),
        "run_notes": notes_of(run),
        "hard": hard_samples(run),
        "settings": settings_of(run),
        "environment": environment_of(run),
        "files": files_of(run),
        "folder": clean(folder),
        "quoted_folder": clean(shlex.quote(folder)),
        "commands": commands_of(run),
    }


def effect_of(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How far the tuned model is from the one before, in words."""
    effect, found = evaluation.effect, list[tuple[str, str]]()
    for name, value in effect.items():
        if name == "kl_nats":
            about = [f"over {effect['kl_tokens']:,.0f} tokens"] if "kl_tokens" in effect else []
            if "highest_kl_nats" in effect:
                about.append(f"at most {figure(effect['highest_kl_nats'])}")
            told = f" ({', '.join(about)})" if about else ""
            found.append(("KL from the model before", f"{figure(value)} nats a token{told}"))
        elif name == "answers_changed":
            found.append(("answers that changed", percent(value)))
        elif name not in ("kl_tokens", "highest_kl_nats", "num_rows"):
            found.append((name.replace("_", " "), figure(value)))
    return found


def render(template: str, contents: Mapping[str, Any]) -> str:
    """Fills a template in; whatever comes from a run is escaped."""
    return _environment().get_template(template).render(contents)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    words: dict[str, Any] = {"counted": counted, "figure": figure, "code_parts": code_parts}
    words["clean"] = clean
    words["version"] = version("tunesmith")
    environment.globals |= words
    return environment


def code_parts(text: str) -> list[tuple[str, bool]]:
    """The parts of a text, and whether each stood between backticks."""
    return [(part, bool(index % 2)) for index, part in enumerate(text.split("`"))]


def write_page(page: str, path: Path) -> Path:
    """Writes a page as UTF-8; half characters, which JSON may hold, as question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode("utf-8", errors="replace"))
    return path
