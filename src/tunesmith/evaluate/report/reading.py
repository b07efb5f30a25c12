"""What a run directory holds, read with patience: files may be missing, torn, or half written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config.load import flatten, recipe_from
from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluate.report.evaluations import Evaluation, read_evaluations, read_lines
from tunesmith.evaluate.report.shapes import decoded, mapping_of, number_of, text_of, texts_in
from tunesmith.io.redact import redact_tree

Events = list[dict[str, Any]]

TRACES = ("events.jsonl", "recipe.yaml", "recipe.resolved.yaml", "summary.json")
"""One of these makes a folder a run directory."""

MOST_ANSWERS = 400
MOST_LINES = 3_000_000
"""Of events: as many steps no run has."""


@dataclass(frozen=True)
class RunRecord:
    """All that the files of a run say.

    Args:
        folder: the run directory.
        events: those that count, in step order.
        summary: of a finished run, else empty.
        recipe: its values as resolved, under dotted keys.
        reasons: of values that were `auto`.
        chosen: keys whose values are no defaults.
        fingerprints: of model, template and data, by names that a person knows.
        answers: lines of samples/answers.jsonl.
        losses: samples/losses.json.
        evaluations: the newest first.
    """

    folder: Path
    events: Events
    summary: Mapping[str, Any]
    recipe: Mapping[str, Any]
    reasons: Mapping[str, str]
    chosen: frozenset[str]
    fingerprints: Mapping[str, str] = field(default_factory=dict[str, str])
    answers: Events = field(default_factory=list[dict[str, Any]])
    losses: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @cached_property
    def by_kind(self) -> dict[str, Events]:
        """Events by their kinds."""
        found: dict[str, Events] = {}
        for event in self.events:
            found.setdefault(event["event"], []).append(event)
        return found

    def of_kind(self, kind: str) -> Events:
        """The events of one kind, in step order."""
        return self.by_kind.get(kind, [])

    @cached_property
    def start(self) -> dict[str, Any]:
        """What the newest start said of the run; what it leaves out is taken from earlier ones."""
        merged: dict[str, Any] = {}
        for event in sorted(self.of_kind("start"), key=lambda each: number_of(each["time"]) or 0):
            merged |= event
        return merged

    @property
    def notes(self) -> list[str]:
        """What the start said of data and model."""
        return texts_in(self.start.get("notes"))

    @property
    def num_steps(self) -> int | None:
        """How many steps the run is to have."""
        found = number_of(self.start.get("num_steps")) or number_of(self.summary.get("steps"))
        return None if found is None else int(found)

    @property
    def last_step(self) -> int:
        """The last one that was logged."""
        steps = self.of_kind("step")
        return int(steps[-1]["step"]) if steps else 0

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.summary) or bool(self.of_kind("done"))

    @property
    def result(self) -> Mapping[str, Any]:
        """The summary, or the last event's copy of it."""
        return self.summary or (self.of_kind("done") or [{}])[-1]

    def figure(self, name: str) -> float | None:
        """A number of the summary."""
        return number_of(self.result.get(name))

    @property
    def measure(self) -> str:
        """The figure that tells where the run stands: the reward of sampled answers, or a loss."""
        return "reward" if any("reward" in each for each in self.of_kind("evaluation")) else "loss"


def read_run(folder: Path) -> RunRecord:
    """Reads a run directory, whatever state it is in.

    Raises:
        RunError: there is no such folder, or nothing of a run in it (`run.none`).
    """
    if not any((folder / name).is_file() for name in TRACES):
        raise RunError(
            "run.none",
            str(folder),
            found="no run directory" if folder.is_dir() else "no such folder",
            expected="the `output` of a training",
            try_="`tunesmith train RECIPE` makes one",
        )
    events = [
        event if event["event"] == "step" else redact_tree(event)
        for event in read_events(folder / "events.jsonl")
    ]
    resolved_text = _text(folder / "recipe.resolved.yaml")
    asked = _yaml(_text(folder / "recipe.yaml"))
    tree = _yaml(resolved_text) or asked
    reasons = reasons_in(resolved_text)
    for event in events:
        if event["event"] == "start":
            reasons |= {k: str(v) for k, v in mapping_of(event.get("reasons")).items()}
    return RunRecord(
        folder=folder,
        events=events,
        summary=redact_tree(_json(folder / "summary.json")),
        recipe=redact_tree(flatten(tree) if tree else {}),
        reasons=redact_tree(reasons),
        chosen=_chosen(asked or tree),
        fingerprints=_fingerprints(folder / "checkpoints"),
        answers=list(read_lines(folder / "samples" / "answers.jsonl", MOST_ANSWERS)),
        losses=_json(folder / "samples" / "losses.json"),
        evaluations=tuple(read_evaluations(folder / "evaluation")),
    )


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """The events that count, in step order.

    Steps past the last checkpoint run and log again after a crash: of several events of one kind
    for one step the last counts, of warnings that say the same the last. Torn lines are skipped.
    """
    latest: dict[tuple[int, str, str], dict[str, Any]] = {}
    for event in read_lines(file, MOST_LINES):
        step, kind = event.get("step"), event.get("event")
        if isinstance(step, int) and isinstance(kind, str):
            event.setdefault("time", None)
            latest[step, kind, text_of(event.get("message"))] = event
    yield from (latest[key] for key in sorted(latest, key=lambda key: key[0]))


REASON = re.compile(r"^( *)([\w.-]+):(?: .*?)?  # (.+)$")
KEY = re.compile(r"^( *)([\w.-]+):")


def reasons_in(text: str) -> dict[str, str]:
    """The comments behind the values of a resolved recipe, by dotted keys."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        key = KEY.match(line)
        if key is None:
            continue
        indent = len(key[1])
        path = [(depth, name) for depth, name in path if depth < indent]
        path.append((indent, key[2]))
        reason = REASON.match(line)
        if reason is not None:
            found[".".join(name for _, name in path)] = reason[3]
    return found


def _chosen(asked: dict[str, Any]) -> frozenset[str]:
    """Keys that a recipe has to name, or whose values are others than if it left them out."""
    needed = {
        "model": mapping_of(asked.get("model")).get("id"),
        "data": {"train": mapping_of(asked.get("data")).get("train")},
    }
    wholes = {key: asked[key] for key in ("method", "objective") if key in asked}
    names = {key: mapping_of(value).get("name") for key, value in wholes.items()}
    for sections in (names, {**names, "objective": wholes.get("objective")}):
        try:
            defaults = flatten(recipe_from({**needed, **sections}).model_dump(mode="json"))
        except RecipeError:  # such as an objective that cannot do without its rewards
            continue
        found = {key for key, value in flatten(asked).items() if defaults.get(key) != value}
        always = ("model.id", "data.train", "method.name", "objective.name", "objective.rewards")
        return frozenset(found | (flatten(asked).keys() & {*always}))
    return frozenset()


def _fingerprints(checkpoints: Path) -> dict[str, str]:
    """Of model and data, from the newest checkpoint."""
    files = sorted(checkpoints.glob("step-*/state.json"))
    found = mapping_of(_json(files[-1]).get("fingerprints")) if files else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> dict[str, Any]:
    try:
        return mapping_of(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def _json(file: Path) -> dict[str, Any]:
    return mapping_of(decoded(_text(file)))
