"""A JSON array of objects, read piece by piece: the file never stands in memory whole."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.json_lines import as_object
from tunesmith.data.readers.json_scan import BrokenJsonError, Scanner
from tunesmith.data.readers.row import Row


def read_json_array(file: DataFile) -> Iterator[Row]:
    """Yields the objects with the lines where they start; stops at broken JSON."""
    scanner = Scanner(file)
    try:
        scanner.skip_space()
        yield from rows_of_array(file, scanner)
        if scanner.skip_space():
            scanner.take("")
    except BrokenJsonError as broken:
        yield Row(file.origin(broken.line), broken.problem)


def rows_of_array(file: DataFile, scanner: Scanner) -> Iterator[Row]:
    """Yields the objects of the array that starts here and moves behind it."""
    scanner.take("[")
    is_more = scanner.skip_space() != "]"
    while is_more:
        scanner.skip_space()
        origin = file.origin(scanner.line)
        yield Row(origin, as_object(scanner.value(), origin))
        is_more = scanner.skip_space() == ","
        if is_more:
            scanner.take(",")
    scanner.take("]")
