"""Rows to canonical samples: which columns hold what, detected by name or mapped in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.readers import read_rows
from tunesmith.data.shapes import (
    MistakeError,
    from_alpaca,
    from_completion,
    from_messages,
    from_sharegpt,
)
from tunesmith.errors import Problem
from tunesmith.types import Json, Origin, Sample

Parser = Callable[[dict[str, Json], Origin], Sample]

# Format -> (columns that must be there, all columns that are read, parser). The order decides
# which format a row with columns of several is taken for.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Parser]] = {
    "messages": (("messages",), ("messages", "tools", "functions"), from_messages),
    "sharegpt": (("conversations",), ("conversations", "system", "tools"), from_sharegpt),
    "alpaca": (
        ("instruction", "output"),
        ("instruction", "input", "output", "system", "history"),
        from_alpaca,
    ),
    "completion": (("prompt", "completion"), ("prompt", "completion"), from_completion),
}

# Other names under which a column is met.
ALIASES: dict[str, tuple[str, ...]] = {"completion": ("response",)}


def read_samples(source: SourceConfig, path: Path) -> Iterator[Sample | Problem]:
    """Yields the samples of one source in file order, with problems in the places of bad rows.

    Raises:
        DataError: the file as a whole cannot be read (see `readers.read_rows`).
    """
    for number, row in enumerate(read_rows(path, encoding=source.encoding)):
        if source.limit is not None and number >= source.limit:
            return
        if isinstance(row.value, Problem):
            yield row.value
        else:
            yield to_sample(row.value, source, Origin(str(path), row.line))


def to_sample(row: dict[str, Json], source: SourceConfig, origin: Origin) -> Sample | Problem:
    """Reads one row as the source's format, or as the one its columns speak of."""
    missing = [actual for actual in source.columns.values() if actual not in row]
    try:
        if missing:
            raise MistakeError(
                "data.columns", f"columns {_names(row)}", f"`{missing[0]}`, mapped in the recipe"
            )
        row = _rename(row, source.columns)
        name = source.format if source.format != "auto" else _detect(row)
        required, _, parse = FORMATS[name]
        missing = [column for column in required if column not in row]
        if missing:
            raise MistakeError(
                "data.columns", f"columns {_names(row)}", f"`{missing[0]}` for format {name}"
            )
        return parse(row, origin)
    except MistakeError as mistake:
        return Problem(str(origin), mistake.code, mistake.found, mistake.expected)


def _rename(row: dict[str, Json], columns: dict[str, str]) -> dict[str, Json]:
    # All at once from the row as it is: a mapping may swap two names.
    row = {**row, **{name: row[actual] for name, actual in columns.items() if actual in row}}
    for canonical, others in ALIASES.items():
        for other in others:
            if canonical not in row and other in row:
                row = {**row, canonical: row[other]}
    return row


def _detect(row: dict[str, Json]) -> str:
    for name, (required, _, _) in FORMATS.items():
        if all(column in row for column in required):
            return name
    shapes = "; ".join(" + ".join(required) for required, _, _ in FORMATS.values())
    raise MistakeError(
        "data.columns",
        f"columns {_names(row)}",
        f"one of: {shapes}; other names are mapped in the recipe, e.g. "
        "columns: {prompt: question, completion: answer}",
    )


def _names(row: dict[str, Json]) -> str:
    return ", ".join(list(row)[:12]) or "(none)"
