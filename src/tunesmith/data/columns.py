"""Rows to canonical samples: which columns hold what, detected by name or mapped in the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

from tunesmith.config.recipe import SourceConfig
from tunesmith.data.readers import Meter, Row, read_rows
from tunesmith.data.shapes import SHAPES, MistakeError, Shape, shape_of
from tunesmith.data.shapes.fields import first_of, is_truth, objects
from tunesmith.data.shapes.known import ALIASES, check_names, columns_of, listed, plain_name
from tunesmith.errors import Problem
from tunesmith.types import Json, Origin, Sample

Recognized = tuple[Shape, dict[str, str]]


def read_samples(
    source: SourceConfig, files: Sequence[Path], meter: Meter | None = None
) -> Iterator[Sample | Problem]:
    """Yields the samples of one source in file order, with problems in the places of bad rows.

    A column that the recipe maps and no row has is one more problem, at the end.

    Raises:
        DataError: a file as a whole cannot be read (see `readers.read_rows`).
    """
    parser = RowParser(source)
    rows = (
        row
        for file in files
        for row in read_rows(file, encoding=source.encoding, sheet=source.sheet, meter=meter)
    )
    for row in islice(rows, source.limit):
        yield row.value if isinstance(row.value, Problem) else parser.parse(row)
    for name in sorted(parser.unseen):
        found = f"no row with a column `{name}`"
        yield Problem(source.path, "data.columns", found, "the column that the recipe maps")


class RowParser:
    """Reads the rows of one source; rows with the same columns are recognized once."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.unseen: set[str] = set()
        self._known: dict[tuple[tuple[str, ...], tuple[bool, ...]], Recognized] = {}
        self._is_first = True

    def parse(self, row: Row) -> Sample | Problem:
        """The row's sample, or what is wrong with it and where."""
        value = cast("dict[str, Json]", row.value)
        columns: dict[str, str] = {}
        try:
            shape, columns = self._shape(value)
            canonical = {name: value[actual] for name, actual in columns.items() if actual in value}
            if self.source.tags:
                canonical = retag(canonical, self.source.tags)
            return shape.parse(canonical, row.origin)
        except MistakeError as mistake:
            return Problem(
                _place(row, columns, mistake), mistake.code, mistake.found, mistake.expected
            )

    def _shape(self, value: dict[str, Json]) -> Recognized:
        names = tuple(value)
        # A label's value decides what its column means: rows of either kind are known apart.
        labels = tuple(is_truth(value[name]) for name in names if plain_name(name) in LABELS)
        known = self._known.get((names, labels))
        if known is None:
            known = self._recognize(value)
            if self._is_first:
                self.unseen = set(known[1].values())
                self._is_first = False
            self.unseen -= set(names)
            if len(self._known) < 1000:
                self._known[names, labels] = known
        return known

    def _recognize(self, value: dict[str, Json]) -> Recognized:
        fixed = self.source.columns
        check_tags(self.source.tags)
        if self.source.format == "auto":
            return shape_of(value, fixed)
        shape = SHAPES[self.source.format]
        check_names(fixed, shape)
        columns = columns_of(shape, value, fixed, with_aliases=True)
        for column in shape.required:
            if columns.get(column) not in value:
                mapped = f", which the recipe maps to `{fixed[column]}`" if column in fixed else ""
                raise MistakeError(
                    "data.columns",
                    f"columns {listed(value)}",
                    f"`{column}` for format {shape.name}{mapped}",
                )
        return shape, columns


LABELS = ("label", *ALIASES["label"])


def _place(row: Row, columns: Mapping[str, str], mistake: MistakeError) -> str:
    """The row, or in a workbook the very cell."""
    letter = row.cells.get(columns.get(mistake.column or "", mistake.column or ""))
    return row.origin.cell(letter) if letter else str(row.origin)


TAGS = ("role", "content", "user", "assistant", "system", "tool", "function", "observation")
"""What `tags` may name: two fields of a message, and roles."""

CHATS = ("messages", "conversations")
SIDES = ("prompt", "completion", "chosen", "rejected", "preferred_output", "non_preferred_output")
"""Columns that hold messages, and those that hold either messages or text."""


def check_tags(tags: Mapping[str, str]) -> None:
    """Refuses tags that name nothing.

    Raises:
        MistakeError: with the nearest name (`data.tags`).
    """
    for name in tags:
        if name not in TAGS:
            near = difflib.get_close_matches(name, TAGS, n=1)
            expected = f"one of: {', '.join(TAGS)}"
            raise MistakeError(
                "data.tags",
                f"`{name}` among the recipe's tags",
                f"`{near[0]}`, or {expected}" if near else expected,
            )


def retag(row: dict[str, Json], tags: Mapping[str, str]) -> dict[str, Json]:
    """Messages with the names of fields and roles that a source uses put into our own.

    Args:
        row: with canonical columns.
        tags: role, content, user, assistant, system, tool, function -> the source's word.
    """
    roles = {
        actual: ROLE_OF_TAG.get(name, name)
        for name, actual in tags.items()
        if name not in ("role", "content")
    }
    role_tag, content_tag = tags.get("role"), tags.get("content")

    def one(item: dict[str, Json]) -> dict[str, Json]:
        own = dict(item)
        if role_tag and role_tag in own:
            own["role"] = own.pop(role_tag)
        if content_tag and content_tag in own:
            own["content"] = own.pop(content_tag)
        name = first_of(own, "role", "from")[1]
        if isinstance(name, str) and name in roles:
            own["role"] = roles[name]
        return own

    result = dict(row)
    for column in (*CHATS, *SIDES):
        value = row.get(column)
        if isinstance(value, dict):
            result[column] = one(value)
        elif value and (isinstance(value, list) or column in CHATS):
            result[column] = [one(item) for item in objects(value, column)]
    return result


ROLE_OF_TAG = {"function": "function_call", "observation": "tool"}
"""LLaMA-Factory's words for roles."""


def to_sample(row: dict[str, Json], source: SourceConfig, origin: Origin) -> Sample | Problem:
    """Reads a single row."""
    return RowParser(source).parse(Row(origin, row))
