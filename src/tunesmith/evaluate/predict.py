"""Answers to the rows of a data file, one line each; a killed prediction goes on where it was.

Each answer is written and flushed as it ends. What decides the answers stands beside the file, and
the same command goes on only if nothing of that has changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.prediction_file import PredictionFile, Settings
from tunesmith.evaluate.prompts import Question
from tunesmith.infer.answers import Answering, Engine
from tunesmith.types import Json, Reporter


def answer_questions(
    engine: Engine,
    questions: Sequence[Question],
    answering: Answering,
    reporter: Reporter,
    *,
    label: str = "Answering",
) -> Iterator[Prediction]:
    """Yields predictions as they end, in any order, under a bar.

    Args:
        engine: answers.
        questions: from `read_questions`.
        answering: how.
        reporter: shows the bar.
        label: of the bar.

    Raises:
        OutOfMemoryError: one row alone does not fit (`memory.one-answer`).
        EvaluationError: a server fails for good (`evaluate.endpoint`).
    """
    answers = engine.answer(questions, answering)
    found = (
        Prediction(
            id=question.id,
            path=question.path,
            line=question.line,
            prompt=question.prompt,
            messages=question.messages,
            label=question.label,
            prediction=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            logprobs=answer.logprobs,
        )
        for question, answer in ((questions[place], answer) for place, answer in answers)
    )
    return reporter.track(label, found, len(questions))


@dataclass(frozen=True)
class Predicted:
    """A finished file.

    Args:
        path: of it.
        predictions: all of them, in the order of the data.
        num_new: rows answered now; the others were there.
        new_tokens: of the answers to these.
        seconds: that these took, the loading of the model left out.
    """

    path: Path
    predictions: list[Prediction]
    num_new: int
    new_tokens: int
    seconds: float


def predict_file(
    path: Path,
    questions: Sequence[Question],
    open_engine: Callable[[], Engine],
    answering: Answering,
    *,
    settings: Settings,
    reporter: Reporter,
    restart: bool = False,
) -> Predicted:
    """Answers all rows into a file, on from what it has; at the end it is in the data's order.

    Args:
        path: of the file; `.settings.json` is added for what decides the answers.
        questions: from `read_questions`.
        open_engine: loads the model; called only if rows wait.
        answering: how they are answered.
        settings: what decides the answers besides questions and `answering`: the model.
        reporter: shows bars.
        restart: anew.

    Raises:
        RunError: the file was made with other settings (`run.other-predictions`).
        LockError: another process writes it.
        DiskError: it cannot be written.
    """
    out = PredictionFile(path)
    decisive = {**settings, **decisive_settings(questions, answering)}
    with out.opened() as file:
        there = out.begin(file, decisive, restart=restart)
        known = {each.id for each in there}
        waiting = [question for question in questions if question.id not in known]
        found: list[Prediction] = []
        started = time.monotonic()
        if waiting:
            if there:
                reporter.note(f"{len(there):,} of {len(questions):,} rows are there already")
            engine = open_engine()
            started = time.monotonic()
            for prediction in answer_questions(engine, waiting, answering, reporter):
                out.append(file, prediction)
                found.append(prediction)
        seconds = time.monotonic() - started
        ordered = out.finish([*there, *found], [question.id for question in questions])
    tokens = sum(each.completion_tokens for each in found)
    return Predicted(path, ordered, len(found), tokens, seconds)


def decisive_settings(questions: Sequence[Question], answering: Answering) -> dict[str, Json]:
    """What decides the answers, the model aside."""
    digest = hashlib.sha256()
    for each in questions:
        row = [each.id, each.prompt, each.ids, each.label, each.messages, each.tools]
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    values = asdict(answering)
    if answering.temperature <= 0:
        for name in ("top_p", "top_k", "seed"):
            del values[name]
    values["stop"] = list(answering.stop)
    return {"rows": len(questions), "questions": digest.hexdigest()[:16], **values}
