"""What else a report tells of a run: data, recipe with reasons, machine, files, commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.evaluate.report.evaluations import newest_with
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.shapes import mapping_of, mappings_in, number_of, text_of, texts_in
from tunesmith.evaluate.report.wording import clean, counted, duration, figure, size

Pair = tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """A value of the resolved recipe.

    Args:
        key: with dots.
        value: as in YAML.
        why: the reason it was chosen for, `set in the recipe`, or empty for a default.
    """

    key: str
    value: str
    why: str


def settings_of(run: RunRecord) -> list[Setting]:
    """All values of the recipe, in its order."""
    found: list[Setting] = []
    for key, value in run.recipe.items():
        why = run.reasons.get(key, "set in the recipe" if key in run.chosen else "")
        shown = _source(value) if key == "data.train" else _value(value)
        found.append(Setting(key, clean(shown), clean(why)))
    return found


def _source(value: object) -> str:
    """Data sources without what they leave open."""
    if not isinstance(value, list):
        return _value(value)
    told = [
        {k: v for k, v in source.items() if v not in (None, "auto", 1.0) and v != {}}
        for source in mappings_in(cast("object", value))
    ]
    parts = (", ".join(f"{k}: {_value(v)}" for k, v in source.items()) for source in told)
    return "; ".join(part.removeprefix("path: ") for part in parts)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:397]}..."


SAMPLES = re.compile(r": ([\d,]+) samples to train on, ([\d,]+) to validate on, ([\d,]+) tokens")


def data_facts(run: RunRecord) -> list[Pair]:
    """What was trained on, as the start of the run told it."""
    overview = text_of(run.start.get("overview"))
    found: list[Pair] = []
    match = SAMPLES.search(overview)
    if match is not None:
        names = ("samples to train on", "samples to validate on", "tokens in one pass")
        found += list(zip(names, match.groups(), strict=True))
        template = overview.partition("template: ")[2]
        found += [("template", template)] if template else []
    elif overview:
        found.append(("overview", overview))
    steps = run.of_kind("step")
    tokens = sum(number_of(step.get("tokens")) or 0 for step in steps)
    supervised = sum(number_of(step.get("supervised_tokens")) or 0 for step in steps)
    if tokens:
        found.append(("supervised", f"{100 * supervised / tokens:.0f} % of the tokens trained on"))
    found += [("source", text) for text in sources_of(run)]
    skipped = ("base model", "chat template", "tokenizer", "version of the store")
    for name, value in run.fingerprints.items():
        if name not in skipped and not name.startswith(("settings", "samples of")):
            found.append((f"hash of {name}", value[:16]))
    return [(clean(name), clean(text)) for name, text in found]


def sources_of(run: RunRecord) -> list[str]:
    """The data files of the recipe."""
    sources = run.recipe.get("data.train")
    return [
        text_of(source.get("path")) for source in mappings_in(sources) if source.get("path")
    ] or ([sources] if isinstance(sources, str) else [])


def environment_of(run: RunRecord) -> list[Pair]:
    """Machine and versions, where the run wrote them down; memory and time, predicted and real."""
    found = [
        (name.replace("_", " "), text)
        for name, value in mapping_of(run.start.get("environment")).items()
        for name, text in _flat(name, value)
    ]
    predicted = run.figure("predicted_peak_of_steps_bytes")
    predicted = predicted or number_of(run.start.get("predicted_peak_bytes"))
    memory = (
        ("peak memory of the steps, predicted", predicted),
        ("peak memory of the steps, measured", run.figure("peak_of_steps_bytes")),
        ("peak memory, loading included", run.figure("peak_memory_bytes")),
    )
    found += [(name, size(value)) for name, value in memory if value]
    seconds = run.figure("runtime_seconds")
    found += [("time of the steps", duration(seconds))] if seconds else []
    times = [number_of(event.get("time")) for event in run.events]
    known = [time for time in times if time]
    if known:
        found.append(("from the first to the last event", duration(max(known) - min(known))))
    starts = len({number_of(event.get("time")) for event in run.of_kind("start")})
    resumed = len(run.of_kind("resume"))
    if starts > 1 or resumed:
        found.append(("starts", f"{max(starts, resumed + 1)}, {resumed} of them went on"))
    finished = text_of(run.result.get("finished"))
    found += [("finished", finished)] if finished else []
    return [(clean(name), clean(text)) for name, text in found]


def _flat(name: str, value: object) -> Iterator[Pair]:
    inner = mapping_of(value)
    if inner:
        for key, each in inner.items():
            yield from _flat(key, each)
    elif value is not None:
        yield name, _value(value)


@dataclass(frozen=True)
class FileSize:
    """A file or folder of the run, and its bytes."""

    name: str
    size: str
    about: str


ABOUT = {
    "checkpoints": "where the run goes on from; may be deleted when it is finished",
    "model": "the result",
    "events.jsonl": "everything that happened, a line each",
    "recipe.yaml": "what was asked for",
    "recipe.resolved.yaml": "all values, with reasons",
    "summary.json": "the figures of the finished run",
    "loss.png": "the curves as a picture",
    "samples": "answers before and after, and the hardest rows",
    "evaluation": "predictions, scores and comparisons",
    "report.html": "this page",
}
MOST_FILES = 40


def files_of(run: RunRecord) -> list[FileSize]:
    """What lies in the run directory."""
    found: list[FileSize] = []
    for path in sorted(run.folder.iterdir())[:MOST_FILES]:
        if path.name.startswith(".") or path.name == "report.html":
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        found.append(FileSize(clean(name), size(_bytes(path)), ABOUT.get(path.name, "")))
    return found


def _bytes(path: Path) -> int:
    """Of a file, or of all files under a folder; 0 for what goes away meanwhile."""
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def commands_of(run: RunRecord) -> list[Pair]:
    """What to type to repeat the run, and to go on from it."""
    folder = str(run.folder)
    again = shlex.quote(f"output={folder}-again")
    asked, resolved = (
        shlex.quote(str(run.folder / name)) for name in ("recipe.yaml", "recipe.resolved.yaml")
    )
    found = [
        (f"tunesmith train {asked} {again}", "the same recipe; `auto` is chosen anew"),
        (f"tunesmith train {resolved} {again}", "the same values on any machine"),
    ]
    quoted = shlex.quote(folder)
    evaluation = newest_with(run.evaluations)
    if not run.is_finished:
        found.insert(0, (f"tunesmith train {asked}", "goes on where this run stopped"))
    elif evaluation is None:
        found.append((f"tunesmith evaluate {quoted}", "measures answers before and after"))
    elif evaluation.command:
        found.append((evaluation.command, "the newest evaluation"))
    found.append((f"tunesmith chat {quoted}", "talks to the result"))
    return [(clean(command), about) for command, about in found]


FOUND = re.compile(r"^\s+([\d,]+) x (data\.[a-z-]+), (first .+)$")


def notes_of(run: RunRecord) -> list[Pair]:
    """What the start said of model and data; what a look at the rows found stands by its code."""
    found: list[Pair] = []
    for note in run.notes:
        match = FOUND.match(note)
        found.append((f"{match[1]} × {match[2]}", match[3]) if match else ("note", note))
    return [(name, clean(text)) for name, text in found]


def happenings(run: RunRecord) -> list[Pair]:
    """Warnings, skipped steps, rollbacks and resumes, in order; many of a kind are cut."""
    found: list[Pair] = []
    for event in run.events:
        if event["event"] in ("warning", "skip", "rollback"):
            found.append((f"step {event['step']:,}", text_of(event.get("message"))))
        elif event["event"] == "resume":
            changed = texts_in(event.get("changed"))
            with_changes = f"; changed: {', '.join(changed)}" if changed else ""
            text = f"went on from {event.get('checkpoint') or 'a checkpoint'}{with_changes}"
            found.append((f"step {event['step']:,}", text))
    hidden = len(found) - MOST_HAPPENINGS
    shown = [(where, clean(text)) for where, text in found[:MOST_HAPPENINGS]]
    return [*shown, ("", f"and {counted(hidden, 'more event')}")] if hidden > 0 else shown


MOST_HAPPENINGS = 60


def validations(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """The validations as a table: names of the columns, and the rows."""
    measured = run.of_kind("evaluation")
    skipped = ("event", "step", "time", "best")
    names: dict[str, Any] = {key: None for e in measured for key in e if key not in skipped}
    columns = ["step", *names]
    rows = [
        [f"{event['step']:,}", *(figure(number_of(event.get(name))) for name in names)]
        for event in measured
    ]
    return [name.replace("_", " ") for name in columns], rows
