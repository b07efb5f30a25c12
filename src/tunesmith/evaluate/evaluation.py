"""An evaluation: what was measured of one model or of two, in files that the report reads.

`evaluation.json` has the figures, `rows.jsonl` every row with the answers and figures of each side.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.evaluate.effect import Effect
from tunesmith.evaluate.intervals import Measured, compare
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Comparison, Score
from tunesmith.io.atomic import write_atomic
from tunesmith.io.redact import redact_tree

VERSION = 1
Role = Literal["before", "after"]


@dataclass(frozen=True)
class Side:
    """One model's part.

    Args:
        role: `before` for what it is compared with.
        target: the model, as the user calls it.
        predictions: its answers, in the order of the data.
        figures: what was measured on the rows, in a form that can be compared.
        others: figures that are not of the rows, such as benchmarks.
        losses: of each row's label, by id.
    """

    role: Role
    target: str
    predictions: Sequence[Prediction]
    figures: Sequence[Measured]
    others: Sequence[Score] = ()
    losses: Mapping[str, float] = field(default_factory=dict[str, float])

    def scores(self) -> list[Score]:
        """All figures, with intervals."""
        return [*(each.score() for each in self.figures), *self.others]


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Args:
        data: what the rows are called.
        sides: before and after, or one alone.
        comparisons: of figures that both have.
        effect: of training; None if there is one model alone.
        notes: what the reader must know.
        command: that does it again.
    """

    data: str
    sides: Sequence[Side]
    comparisons: Sequence[Comparison]
    effect: Effect | None
    notes: Sequence[str]
    command: str
    scores: Mapping[str, Sequence[Score]]

    def as_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        return {
            "version": VERSION,
            "created": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": self.command,
            "data": {
                "label": self.data,
                "rows": len(self.sides[-1].predictions),
                "fingerprint": self._fingerprint(),
            },
            "models": [self._model(side) for side in self.sides],
            "comparisons": [each.as_json() for each in self.comparisons],
            "effect": self.effect and self.effect.as_json(),
            "notes": list(self.notes),
        }

    def _fingerprint(self) -> str:
        """Of what was asked, of the labels, how it was answered, and beside what."""
        rows = [[each.id, each.label] for each in self.sides[-1].predictions]
        rows.append([*(side.target for side in self.sides[:-1]), *self.notes[:1]])
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]

    def _model(self, side: Side) -> dict[str, Any]:
        return {
            "role": side.role,
            "name": Path(side.target).name or side.target,
            "target": side.target,
            "predictions": f"{side.role}.jsonl",
            "scores": {score.name: score.as_json() for score in self.scores[side.role]},
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every row with what each side has for it."""
        by_id = [{each.id: n for n, each in enumerate(side.predictions)} for side in self.sides]
        found: list[dict[str, Any]] = []
        for row in self.sides[-1].predictions:
            kept: dict[str, Any] = {"id": row.id, "path": row.path, "line": row.line}
            kept |= {"prompt": row.prompt, "messages": list(row.messages), "label": row.label}
            for side, places in zip(self.sides, by_id, strict=True):
                if row.id in places:
                    kept[side.role] = self._row(side, places[row.id], row.id)
            found.append(kept)
        return found

    def _row(self, side: Side, place: int, row_id: str) -> dict[str, Any]:
        values = {each.name: each.rows[place] for each in side.figures if each.rows}
        prediction = side.predictions[place]
        return {
            "prediction": prediction.prediction,
            "finish_reason": prediction.finish_reason,
            "loss": side.losses.get(row_id),
            "scores": {name: value for name, value in values.items() if value is not None},
        }


def build_evaluation(
    data: str,
    sides: Sequence[Side],
    *,
    comparisons: Sequence[Comparison] = (),
    effect: Effect | None = None,
    notes: Sequence[str] = (),
    command: str = "",
) -> Evaluation:
    """Scores each side and compares the two, where there are two, on the rows of both.

    Args:
        data: what the rows are called.
        sides: their answers are of the same rows in the same order.
        comparisons: of what is not of the rows.
        effect: of training.
        notes: what the reader must know.
        command: that does it again.
    """
    compared: list[Comparison] = []
    if len(sides) == 2:
        later = {each.name: each for each in sides[1].figures}
        compared = [
            compare(each, later[each.name])
            for each in sides[0].figures
            if each.better != "neither" and each.name in later
        ]
    scores = {side.role: side.scores() for side in sides}
    return Evaluation(data, sides, [*compared, *comparisons], effect, notes, command, scores)


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes `evaluation.json` and `rows.jsonl`, the latter first."""
    folder.mkdir(parents=True, exist_ok=True)
    # Row by row: a secret without an end would take the rows behind it along.
    rows = (redact_tree(_finite(row)) for row in evaluation.rows())
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomic(folder / "rows.jsonl", "".join(f"{line}\n" for line in lines))
    tree = redact_tree(_finite(evaluation.as_json()))
    text = json.dumps(tree, ensure_ascii=False, indent=1, allow_nan=False)
    write_atomic(folder / "evaluation.json", f"{text}\n")


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: they are written as null."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case _:
            return value
