"""The tools of the comparison, and where each leaves what."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fault_rows.server import Server
from safetensors import safe_open


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a torn last one is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file as numpy arrays."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def largest_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Of two sets of tensors; infinite where names differ or a number is not finite."""
    if first.keys() != second.keys() or not first:
        return float("inf")
    found = max(float(np.abs(first[name] - second[name]).max()) for name in first)
    return found if np.isfinite(found) else float("inf")


class Peer:
    """HF Trainer, TRL or LLaMA-Factory.

    Args:
        name: what the table calls it.
        kind: hf, trl or llamafactory.
        python: of an environment that has it.
        folder: for its caches.
    """

    weights_name = "adapter_model.safetensors"
    optimizer_name = "optimizer.pt"
    has_collator = True
    final = "final"

    def __init__(self, name: str, kind: str, python: str, folder: Path) -> None:
        self.name, self.kind, self.server = name, kind, Server(kind, python, folder)
        if kind == "llamafactory":
            self.has_collator, self.final = False, "run"

    def write_data(self, folder: Path, rows: list[Any]) -> None:
        """The rows in the shape that its users give them."""
        if self.kind == "trl":
            rows = [
                {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
                if isinstance(row["messages"], list)
                else {"prompt": row["messages"], "completion": row["messages"]}
                for row in rows
            ]
        write_rows(folder, rows)

    def checkpoints(self, folder: Path) -> list[Path]:
        """By step."""
        found = (folder / "run").glob("checkpoint-*")
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def step_of(self, checkpoint: Path) -> int:
        """The step of a checkpoint."""
        return int(checkpoint.name.split("-")[1])

    def empty_newer(self, folder: Path) -> Path:
        """Name of a checkpoint after the newest one."""
        return folder / "run" / f"checkpoint-{self.step_of(self.checkpoints(folder)[-1]) + 4}"

    def final_weights(self, folder: Path) -> dict[str, Any]:
        """Of the finished run, or nothing."""
        path = folder / self.final / self.weights_name
        return read_weights(path) if path.exists() else {}

    def losses(self, folder: Path) -> dict[int, float]:
        """The loss of each step, of its last time."""
        return {each["step"]: each["loss"] for each in read_lines(folder / "losses.jsonl")}

    def rows(self, folder: Path) -> dict[int, Any]:
        """What each step trained on, of its last time."""
        found: dict[int, dict[int, list[Any]]] = {}
        for each in read_lines(folder / "rows.jsonl"):
            found.setdefault(each["step"], {}).setdefault(each["process"], []).extend(each["rows"])
        return {step: sorted(list(starts.values())[-1]) for step, starts in found.items()}

    def least_supervised(self, folder: Path) -> int | None:
        """Supervised tokens of the step that has the fewest."""
        steps: dict[int, int] = {}
        for each in read_lines(folder / "rows.jsonl"):
            steps[each["step"]] = steps.get(each["step"], 0) + (each["supervised"] or 0)
        return min(steps.values(), default=None)


class Tunesmith:
    """tunesmith by its command line; the same command resumes."""

    name = "tunesmith"
    kind = "tunesmith"
    weights_name = "adapter_model.safetensors"
    optimizer_name = "optim.safetensors"
    has_collator = False

    def __init__(self, folder: Path) -> None:
        self.server = Server("tunesmith", sys.executable, folder)

    def write_data(self, folder: Path, rows: list[Any]) -> None:
        """The rows as they are."""
        write_rows(folder, rows)

    def checkpoints(self, folder: Path) -> list[Path]:
        """By step."""
        found = (folder / "run/checkpoints").glob("step-*")
        return sorted(path for path in found if path.name[5:].isdecimal())

    def step_of(self, checkpoint: Path) -> int:
        """The step of a checkpoint."""
        return int(checkpoint.name[5:])

    def empty_newer(self, folder: Path) -> Path:
        """Name of a checkpoint after the newest one."""
        step = self.step_of(self.checkpoints(folder)[-1]) + 4
        return folder / "run/checkpoints" / f"step-{step:08d}"

    def final_weights(self, folder: Path) -> dict[str, Any]:
        """Of the finished run, or nothing."""
        path = folder / "run/model" / self.weights_name
        return read_weights(path) if path.exists() else {}

    def events(self, folder: Path, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, in the order they were written."""
        return [each for each in read_lines(folder / "run/events.jsonl") if each["event"] == kind]

    def losses(self, folder: Path) -> dict[int, float]:
        """The loss of each step, of its last time."""
        return {each["step"]: each["loss"] for each in self.events(folder, "step")}

    def rows(self, folder: Path) -> dict[int, Any]:
        """What tells the rows of a step: its tokens, those with loss, and the loss to the bit."""
        steps = self.events(folder, "step")
        keys = ("tokens", "supervised_tokens", "loss")
        return {each["step"]: tuple(each[key] for key in keys) for each in steps}

    def least_supervised(self, folder: Path) -> int | None:
        """Supervised tokens of the step that has the fewest."""
        counts = [each["supervised_tokens"] for each in self.events(folder, "step")]
        return min(counts, default=None)


Tool = Peer | Tunesmith


def write_rows(folder: Path, rows: list[Any]) -> None:
    """JSON lines."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
