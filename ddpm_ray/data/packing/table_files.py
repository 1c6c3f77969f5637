"""Rows of one Parquet or Arrow file of a stranger, a few at a time.

Arrow files are read batch by batch from where each lies; one that is compressed, or whose columns
are dictionaries, is refused, as nobody knows how large it would become. Of a Parquet file no more
than a page and an image are unpacked at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_ray.data import arrow_io
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.packing import class_names, file_source
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.data.shards import DatasetError
from ddpm_ray.redaction import counted
from ddpm_ray.storage.object_store import StorageError

LEAST_ROW_BYTES = 8  # no image file is smaller: a file that claims more rows lies
LABELS_AT_ONCE = 2**16
MAGIC = b"ARROW1\0\0"  # of Arrow's file format; its stream format has none


@dataclass(frozen=True)
class TableFile:
    """One table, opened and checked."""

    name: str
    size: int  # in bytes
    rows: int
    schema: pa.Schema
    parts: tuple[tuple[int, int], ...]  # first row, and number of a row group or place of a batch


def opened(url: str, name: str, size: int) -> TableFile:
    """The table at `url`, without its images. Raises DatasetError."""
    parts, rows = list[tuple[int, int]](), 0
    with _one_line(url), file_source.opened(url) as stream:
        if _is_parquet(name):
            file = _parquet(stream)
            schema, groups = file.schema_arrow, file.metadata.num_row_groups
            for number in range(groups):
                parts.append((rows, number))
                rows += file.metadata.row_group(number).num_rows
        else:
            schema = _arrow_schema(stream)
            for place, batch in _arrow_batches(stream, schema):
                parts.append((rows, place))
                rows += batch.num_rows
        if rows < 0 or rows * LEAST_ROW_BYTES > size:
            raise ArrowFileError(f"it claims {counted(rows, 'row')} in {counted(size, 'byte')}")
        if len(set(schema.names)) < len(schema.names):
            raise ArrowFileError("two columns have the same name")
    return TableFile(name, size, rows, schema, tuple(parts))


def labels(url: str, file: TableFile, column: str) -> list[Label]:
    """The label of each row. Raises DatasetError."""
    found: list[Label] = []
    where = f"column {column!r}"
    with _one_line(url), file_source.opened(url) as stream:
        if _is_parquet(file.name):
            text = pa.types.is_string(file.schema.field(column).type)
            table = _parquet(stream, [column] if text else None)
            for batch in table.iter_batches(LABELS_AT_ONCE, columns=[column]):
                found += _labels(batch.column(0), where)
        else:
            for _, batch in _arrow_batches(stream, _arrow_schema(stream)):
                found += _labels(batch.column(column), where)
        if len(found) != file.rows:
            raise ArrowFileError(f"{where} has {counted(len(found), 'row')} of {file.rows}")
    return found


def images(url: str, file: TableFile, column: str, rows: range) -> Iterator[bytes]:
    """The image file of each of these rows, b"" where there is none. Raises DatasetError."""
    with file_source.opened(url) as stream:
        found = _images(stream, file, column, rows)
        for row in rows:
            with _one_line(url):
                image = next(found, None)
                if image is None:
                    raise ArrowFileError(f"column {column!r} ends before row {row}")
            yield image


def holds_files(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold image files."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and holds_files(kind.field(at).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def holds_labels(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold labels."""
    if pa.types.is_dictionary(kind):
        return holds_labels(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(pa.types.is_integer(kind) or text)


def _images(stream: BinaryIO, file: TableFile, column: str, rows: range) -> Iterator[bytes]:
    for first, values in _batches(stream, file, column, rows):
        for at in range(max(rows.start - first, 0), min(rows.stop - first, len(values))):
            value = values[at].as_py()
            yield (value.get("bytes") if isinstance(value, dict) else value) or b""


def _batches(
    stream: BinaryIO, file: TableFile, column: str, rows: range
) -> Iterator[tuple[int, Any]]:
    """First row and values of runs that hold these rows."""
    ends = [first for first, _ in file.parts[1:]] + [file.rows]
    held = [
        (first, part)
        for (first, part), end in zip(file.parts, ends, strict=True)
        if first < rows.stop and end > rows.start
    ]
    if _is_parquet(file.name):
        nested = pa.types.is_struct(file.schema.field(column).type)
        leaf = f"{column}.bytes" if nested else column
        row, groups = held[0][0], [number for _, number in held]
        # One row at a time: a page of one image may name it a million times.
        for batch in _parquet(stream).iter_batches(1, row_groups=groups, columns=[leaf]):
            yield row, batch.column(0)
            row += batch.num_rows
            if row >= rows.stop:
                return
    else:
        schema = _arrow_schema(stream)
        for first, place in held:
            _, batch = next(_arrow_batches(stream, schema, place))
            yield first, batch.column(column)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _parquet(stream: BinaryIO, dictionaries: list[str] | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(stream, read_dictionary=dictionaries, buffer_size=2**20, pre_buffer=False)


def _arrow_schema(stream: BinaryIO) -> pa.Schema:
    stream.seek(len(MAGIC) if stream.read(len(MAGIC)) == MAGIC else 0)
    message = pa.ipc.read_message(stream)
    if message.type != "schema":
        raise ArrowFileError(f"it opens with a {message.type}")
    return pa.ipc.read_schema(message)


def _arrow_batches(
    stream: BinaryIO, schema: pa.Schema, place: int | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch from `place` on, or from where the stream stands, and its own place."""
    stream.seek(stream.tell() if place is None else place)
    while True:
        place = stream.tell()
        try:
            message = pa.ipc.read_message(stream)
        except EOFError:  # the end mark, or the end of a file that has none
            return
        if message.type != "record batch":
            raise ArrowFileError(f"it holds a {message.type}, which is not read")
        if arrow_io.is_compressed(message):
            raise ArrowFileError("it is compressed, and nobody knows how large it would become")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield place, batch


def _labels(values: Any, where: str) -> Iterator[Label]:
    """Labels of one column, each text once in memory; -1 is how some write that there is none."""
    if pa.types.is_dictionary(values.type):
        known = [class_names.checked(value, where) for value in values.dictionary.to_pylist()]
        yield from (None if at is None else known[at] for at in values.indices.to_pylist())
        return
    for value in values.to_pylist():
        yield None if value == -1 else class_names.checked(value, where)


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Make one line of whatever Arrow raises."""
    try:
        yield
    except (DatasetError, StorageError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "write it again, uncompressed if it is an .arrow file"
        raise DatasetError(url, f"not a readable table ({text})", remedy) from error
