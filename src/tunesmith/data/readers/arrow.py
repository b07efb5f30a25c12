"""Parquet tables, and Arrow tables in both forms: streams (as `datasets` saves them) and files.

Lists and structs become lists and objects, dates and decimals text, NaN null. Bytes are text where
they are UTF-8 (old Spark writes text so) and null elsewhere: pictures and sound are left out.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Iterator
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.readers.data_file import DataFile
from tunesmith.data.readers.header import check_names
from tunesmith.data.readers.row import Row
from tunesmith.errors import DataError, Problem
from tunesmith.types import Json

ROWS_AT_ONCE = 500

FILE_MAGIC = b"ARROW1"


def read_parquet(file: DataFile) -> Iterator[Row]:
    """Yields the rows; lines count rows from 1.

    Raises:
        DataError: no Parquet file, or a damaged one (`data.parquet`).
    """
    size = file.path.stat().st_size
    start = file.meter.bytes_read
    number = 0
    try:
        # Python opens the file: Arrow takes no names but those of UTF-8.
        with file.path.open("rb") as raw, pq.ParquetFile(raw, buffer_size=1 << 20) as table:
            _check_schema(file, table.schema_arrow)
            num_rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from _rows(file, batch, number)
                number += batch.num_rows
                file.meter.bytes_read = start + size * number // num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, "data.parquet", "a whole Parquet file", error) from error
    file.meter.bytes_read = start + size


def read_arrow(file: DataFile) -> Iterator[Row]:
    """Yields the rows; lines count rows from 1.

    Raises:
        DataError: no Arrow table, or a damaged one (`data.arrow`).
    """
    start = file.meter.bytes_read
    number = 0
    try:
        with file.path.open("rb") as raw, pa.PythonFile(raw, mode="r") as source:
            size = source.size()
            for batch in _arrow_batches(source):
                _check_schema(file, batch.schema)
                for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield from _rows(file, batch.slice(first, ROWS_AT_ONCE), number + first)
                number += batch.num_rows
                file.meter.bytes_read = start + min(size, source.tell())
            file.meter.bytes_read = start + size
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, "data.arrow", "a whole Arrow table", error) from error


def _arrow_batches(source: pa.PythonFile) -> Iterator[pa.RecordBatch]:
    magic = source.read(len(FILE_MAGIC))
    source.seek(0)
    if magic == FILE_MAGIC:
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from pa.ipc.open_stream(source)


def _check_schema(file: DataFile, schema: pa.Schema) -> None:
    check_names(schema.names, [str(file.path)] * len(schema.names))


def _damaged(file: DataFile, code: str, expected: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return DataError([Problem(str(file.path), code, f"a damaged file ({reason})", expected)])


def _rows(file: DataFile, batch: pa.RecordBatch, number: int) -> Iterator[Row]:
    special = [field.name for field in batch.schema if not _is_json(field.type)]
    try:
        values = batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):  # text that is no UTF-8, a date in the year 300,000
        for index in range(batch.num_rows if batch.num_rows > 1 else 0):
            yield from _rows(file, batch.slice(index, 1), number + index)
        if batch.num_rows == 1:
            yield _unreadable(file, batch, number + 1)
        return
    for line, value in enumerate(values, start=number + 1):
        for name in special:
            value[name] = _as_json(value[name])
        yield Row(file.origin(line), value)


def _unreadable(file: DataFile, batch: pa.RecordBatch, line: int) -> Row:
    """The problem of a row that Python cannot hold, with the column."""
    origin = file.origin(line)
    for name in batch.schema.names:
        try:
            batch.column(name).to_pylist()
        except (ValueError, OverflowError) as error:
            code = "data.encoding" if isinstance(error, UnicodeDecodeError) else "data.row"
            found = f"a value in column `{name}` that cannot be read ({error})"
            return Row(origin, Problem(str(origin), code, found, "text, numbers or lists of them"))
    raise AssertionError("the row as a whole could not be read, its columns can")


def _is_json(kind: pa.DataType) -> bool:
    """Whether values of a type are JSON as they come; floats are not, for NaN."""
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_json(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_json(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    return any(test(kind) for test in (*tests, pa.types.is_boolean, pa.types.is_null))


def _as_json(value: object) -> Json:
    if isinstance(value, dict):
        members = cast("dict[object, object]", value)
        return {str(name): _as_json(member) for name, member in members.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in cast("list[object]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return _text_or_nothing(value)
    return cast("Json", value)


def _text_or_nothing(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
