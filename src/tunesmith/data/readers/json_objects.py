"""JSON objects that stand over many lines, and objects that wrap the list of rows.

`{"version": "1.1", "data": [{...}, {...}]}` has the rows of the list; an object without such a list
is one row, and more may follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.json_array import rows_of_array
from tunesmith.data.readers.json_scan import BrokenJsonError, Scanner
from tunesmith.data.readers.row import Row
from tunesmith.types import Json

# Lists of objects that belong to one row: an object with such a column is a row itself.
COLUMNS_WITH_LISTS = frozenset(
    {
        *("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "history"),
        *("tools", "functions", "tool_calls", "prompt", "completion", "input", "output"),
        *("response", "chosen", "rejected", "choices"),
    }
)


def read_json_objects(file: DataFile) -> Iterator[Row]:
    """Yields the rows of a file that starts with an object; stops at broken JSON."""
    scanner = Scanner(file)
    try:
        while scanner.skip_space():
            yield from _rows_of_object(file, scanner)
    except BrokenJsonError as broken:
        yield Row(file.origin(broken.line), broken.problem)


def _rows_of_object(file: DataFile, scanner: Scanner) -> Iterator[Row]:
    origin = file.origin(scanner.line)
    members: dict[str, Json] = {}
    wrapper = ""
    scanner.take("{")
    is_more = scanner.skip_space() != "}"
    while is_more:
        name = _member_name(scanner)
        is_row = name in COLUMNS_WITH_LISTS or not COLUMNS_WITH_LISTS.isdisjoint(members)
        if not is_row and scanner.opens_list_of_objects():
            if wrapper:
                found = f"a second list of objects, `{name}` behind `{wrapper}`"
                raise scanner.broken(found, "one list of rows in a file")
            wrapper = name
            yield from rows_of_array(file, scanner)
        else:
            members[name] = cast("Json", scanner.value())
        is_more = scanner.skip_space() == ","
        if is_more:
            scanner.take(",")
    scanner.take("}")
    if not wrapper:
        yield Row(origin, members)
    elif scanner.skip_space():
        scanner.take("")


def _member_name(scanner: Scanner) -> str:
    """Moves over `"name":` to the value."""
    if scanner.skip_space() != '"':
        raise scanner.broken("broken JSON: no name in quotes", 'a member, `"name": value`')
    name = str(scanner.value())
    scanner.skip_space()
    scanner.take(":")
    scanner.skip_space()
    return name
