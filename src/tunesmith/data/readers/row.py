"""A row of a data file, before anyone has asked what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.errors import Problem
from tunesmith.types import Json, Origin


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, or the problem that stands in its place.

    `cells` names the spreadsheet letter of each column (workbooks only), so that a mistake in one
    column of row 7 is found as `book.xlsx:Sheet1!C7`.
    """

    origin: Origin
    value: dict[str, Json] | Problem
    cells: Mapping[str, str] = field(default_factory=dict[str, str])
