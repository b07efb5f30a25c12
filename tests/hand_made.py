"""Predictions made by hand."""

from __future__ import annotations

from typing import Any

from tunesmith.evaluate.prediction import Prediction


def predicted(answer: str, label: str | None, prompt: str = "q", **others: Any) -> Prediction:
    """One prediction; its id is its prompt unless given."""
    values: dict[str, Any] = {
        "id": prompt,
        "path": "data.jsonl",
        "line": 1,
        "prompt": prompt,
        "messages": ({"role": "user", "content": prompt},),
        "label": label,
        "prediction": answer,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 5,
    }
    return Prediction(**{**values, **others})
