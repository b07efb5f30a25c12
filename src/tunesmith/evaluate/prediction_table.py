"""Predictions as a table for people: question, label and prediction side by side."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.data.readers.workbook import write_workbook
from tunesmith.evaluate.prediction import Prediction
from tunesmith.io.atomic import atomic_text

TABLES = (".csv", ".xlsx")
"""Endings that a table may have."""

COLUMNS = ("id", "line", "question", "label", "prediction", "finish_reason", "completion_tokens")


def write_table(path: Path, predictions: Sequence[Prediction]) -> None:
    """Writes all of them, by the ending of the path.

    Raises:
        DataError: more than a cell or sheet of Excel can hold (`data.excel-size`).
        DiskError: it cannot be written (`disk.write`).
    """
    if path.suffix == ".xlsx":
        write_workbook(path, COLUMNS, _rows(predictions))
        return
    with atomic_text(path) as file:
        file.write("\ufeff")  # Excel takes a file without it for one in an old encoding
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_rows(predictions))


def _rows(predictions: Sequence[Prediction]) -> Iterator[list[str]]:
    for each in predictions:
        question = str(each.messages[-1]["content"] or "") if each.messages else each.prompt
        texts = (each.id, each.line, question, each.label or "", each.prediction)
        yield [str(value) for value in (*texts, each.finish_reason, each.completion_tokens)]
