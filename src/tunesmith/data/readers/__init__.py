"""One reader per file format; each yields rows with their places, and problems in place."""

from tunesmith.data.readers.data_file import Meter
from tunesmith.data.readers.files import all_files, find_files, named_splits, total_bytes
from tunesmith.data.readers.records import read_rows
from tunesmith.data.readers.row import Row

__all__ = [
    "Meter",
    "Row",
    "all_files",
    "find_files",
    "named_splits",
    "read_rows",
    "total_bytes",
]
