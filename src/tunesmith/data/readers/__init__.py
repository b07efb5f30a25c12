"""One reader per file format; each yields rows with their line numbers, and problems in place."""

from tunesmith.data.readers.records import Row, read_rows

__all__ = ["Row", "read_rows"]
