"""What a model answered to a row of data: one line of a file of predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import DataError, Problem

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row's prompt, its own answer, and the model's.

    Args:
        id: of the row, the same for all models: it is made of the conversation and its place.
        path: the data file.
        line: in it.
        prompt: as rendered, the text that the model went on from.
        messages: the conversation before the answer, as the OpenAI API writes it; empty for a
            plain prompt.
        label: the data's own answer; None if the row has none.
        prediction: the model's answer, without special tokens and the stop string.
        finish_reason: `stop`, or `length` where the limit of tokens cut it.
        prompt_tokens: of the prompt.
        completion_tokens: of the answer, the token that ended it included.
        logprobs: the answer's tokens as text with their log-probabilities, if asked for.
    """

    id: str
    path: str
    line: int
    prompt: str
    messages: tuple[Mapping[str, Any], ...]
    label: str | None
    prediction: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[tuple[str, float], ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """A line of the file."""
        found = asdict(self)
        if self.logprobs is None:
            del found["logprobs"]
        return found


def prediction_id(path: str, line: int, messages: Sequence[Mapping[str, Any]], prompt: str) -> str:
    """The id of a row: 16 hexadecimal digits of what is asked and where it stands."""
    text = json.dumps([path, line, list(messages), prompt], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_predictions(file: Path) -> list[Prediction]:
    """The predictions of a file, in its order; a last line that was cut by a kill is left out.

    Raises:
        DataError: it cannot be read, or is not what `tunesmith predict` writes
            (`data.not-predictions`).
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        wanted = "a file that `tunesmith predict` wrote"
        problem = Problem(str(file), "data.not-predictions", str(error), wanted)
        raise DataError([problem]) from error
    found: list[Prediction] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                [
                    Problem(
                        f"{file}:{number}",
                        "data.not-predictions",
                        f"{type(error).__name__}: {error}",
                        "a line that `tunesmith predict` wrote",
                    )
                ]
            ) from error
    return found


def _from_json(row: dict[str, Any]) -> Prediction:
    logprobs = row.get("logprobs")
    pairs = None if logprobs is None else tuple((str(t), float(p)) for t, p in logprobs)
    values: dict[str, Any] = {**row, "messages": tuple(row["messages"]), "logprobs": pairs}
    return Prediction(**values)
