"""Read rows of one untrusted Parquet or Arrow file, a few at a time.

Arrow files are read batch by batch at their offsets; compressed files and dictionary columns are
refused, as their size in memory is unknown. Of a Parquet file at most one page and one image are
decompressed at a time.
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
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import class_names, file_source
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.redaction import counted
from ddpm_ray.storage.errors import StorageError

MIN_ROW_BYTES = 8  # no image file is smaller, so a file that claims more rows is invalid
LABELS_AT_ONCE = 2**16
MAGIC = b"ARROW1\0\0"  # start of Arrow's file format; the stream format has none


@dataclass(frozen=True)
class TableFile:
    """A checked table."""

    name: str
    size: int  # in bytes
    rows: int
    schema: pa.Schema
    parts: tuple[tuple[int, int], ...]  # (first row, row group number or batch offset)


def open_table(url: str, name: str, size: int) -> TableFile:
    """Read the schema and row counts of the table at `url`. Raises DatasetError."""
    parts, rows = list[tuple[int, int]](), 0
    with _one_line(url), file_source.open_object(url) as stream:
        if _is_parquet(name):
            file = _parquet(stream)
            schema, groups = file.schema_arrow, file.metadata.num_row_groups
            for number in range(groups):
                parts.append((rows, number))
                rows += file.metadata.row_group(number).num_rows
        else:
            schema = _arrow_schema(stream)
            for offset, batch in _arrow_batches(stream, schema):
                parts.append((rows, offset))
                rows += batch.num_rows
        if rows < 0 or rows * MIN_ROW_BYTES > size:
            raise ArrowFileError(f"it claims {counted(rows, 'row')} in {counted(size, 'byte')}")
        if len(set(schema.names)) < len(schema.names):
            raise ArrowFileError("two columns have the same name")
    return TableFile(name, size, rows, schema, tuple(parts))


def read_labels(url: str, file: TableFile, column: str) -> list[Label]:
    """Return the label of each row. Raises DatasetError."""
    found: list[Label] = []
    where = f"column {column!r}"
    with _one_line(url), file_source.open_object(url) as stream:
        if _is_parquet(file.name):
            text = pa.types.is_string(file.schema.field(column).type)
            table = _parquet(stream, [column] if text else None)
            for batch in table.iter_batches(LABELS_AT_ONCE, columns=[column]):
                found += _labels(batch.column(0), where)
        else:
            for _, batch in _arrow_batches(stream, _arrow_schema(stream)):
                found += _labels(batch.column(column), where)
        if len(found) != file.rows:
            raise ArrowFileError(f"{where} has {counted(len(found), 'row')}, the file {file.rows}")
    return found


def read_captions_of(url: str, file: TableFile, column: str) -> Iterator[object]:
    """Yield the caption, list of captions or None of each row. Raises DatasetError."""
    rows = 0
    with _one_line(url), file_source.open_object(url) as stream:
        kind = file.schema.field(column).type
        for values in _caption_batches(stream, file, column, _is_text(kind)):
            rows += len(values)
            if pa.types.is_dictionary(values.type):
                known = values.dictionary.to_pylist()
                indices = values.indices.to_pylist()
                yield from (None if at is None else known[at] for at in indices)
            else:
                yield from (value.as_py() for value in values)
        if rows != file.rows:
            raise ArrowFileError(f"column {column!r} has {counted(rows, 'row')}, not {file.rows}")


def _caption_batches(
    stream: BinaryIO, file: TableFile, column: str, is_text: bool
) -> Iterator[pa.Array]:
    """Yield the values of a column of captions, a part of its rows at a time."""
    if not _is_parquet(file.name):
        for _, batch in _arrow_batches(stream, _arrow_schema(stream)):
            yield batch.column(column)
        return
    # A dictionary page may refer to one long text a million times: texts stay in a dictionary, and
    # lists are read one by one.
    table = _parquet(stream, [column] if is_text else None)
    for batch in table.iter_batches(LABELS_AT_ONCE if is_text else 1, columns=[column]):
        yield batch.column(0)


def read_image_files(url: str, file: TableFile, column: str, rows: range) -> Iterator[bytes]:
    """Yield the image file of each of these rows, b"" if it is null. Raises DatasetError."""
    with file_source.open_object(url) as stream:
        found = _images(stream, file, column, rows)
        for row in rows:
            with _one_line(url):
                image = next(found, None)
                if image is None:
                    raise ArrowFileError(f"column {column!r} ends before row {row}")
            yield image


def holds_files(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold image files."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and holds_files(kind.field(at).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def holds_labels(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold labels."""
    if pa.types.is_dictionary(kind):
        return holds_labels(kind.value_type)
    return bool(pa.types.is_integer(kind) or _is_text(kind))


def holds_captions(kind: pa.DataType) -> bool:
    """Return whether a column of this type can hold captions: texts, or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _images(stream: BinaryIO, file: TableFile, column: str, rows: range) -> Iterator[bytes]:
    for first, values in _batches(stream, file, column, rows):
        for at in range(max(rows.start - first, 0), min(rows.stop - first, len(values))):
            value = values[at].as_py()
            yield (value.get("bytes") if isinstance(value, dict) else value) or b""


def _batches(
    stream: BinaryIO, file: TableFile, column: str, rows: range
) -> Iterator[tuple[int, Any]]:
    """Yield the first row and the values of each run of rows that overlaps `rows`."""
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
        # One row at a time: a dictionary page with one image may refer to it a million times.
        for batch in _parquet(stream).iter_batches(1, row_groups=groups, columns=[leaf]):
            yield row, batch.column(0)
            row += batch.num_rows
            if row >= rows.stop:
                return
    else:
        schema = _arrow_schema(stream)
        for first, offset in held:
            _, batch = next(_arrow_batches(stream, schema, offset))
            yield first, batch.column(column)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _parquet(stream: BinaryIO, dictionaries: list[str] | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(stream, read_dictionary=dictionaries, buffer_size=2**20, pre_buffer=False)


def _arrow_schema(stream: BinaryIO) -> pa.Schema:
    stream.seek(len(MAGIC) if stream.read(len(MAGIC)) == MAGIC else 0)
    message = pa.ipc.read_message(stream)
    if message.type != "schema":
        raise ArrowFileError(f"it starts with a {message.type}, not with a schema")
    return pa.ipc.read_schema(message)


def _arrow_batches(
    stream: BinaryIO, schema: pa.Schema, offset: int | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield each batch with its offset, from `offset` or the stream's current position on."""
    stream.seek(stream.tell() if offset is None else offset)
    while True:
        offset = stream.tell()
        try:
            message = pa.ipc.read_message(stream)
        except EOFError:  # end-of-stream marker, or end of a file without one
            return
        if message.type != "record batch":
            raise ArrowFileError(f"it holds a {message.type}, which is not supported")
        if arrow_io.is_compressed(message):
            raise ArrowFileError("it is compressed, so its size in memory is unknown")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        yield offset, batch


def _labels(values: Any, where: str) -> Iterator[Label]:
    """Yield the labels of one column; -1 and null mean no label."""
    if pa.types.is_dictionary(values.type):
        known = [class_names.check_label(value, where) for value in values.dictionary.to_pylist()]
        yield from (None if at is None else known[at] for at in values.indices.to_pylist())
        return
    for value in values.to_pylist():
        yield None if value == -1 else class_names.check_label(value, where)


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Convert any exception of Arrow to a DatasetError of one line."""
    try:
        yield
    except (DatasetError, StorageError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "write it again, uncompressed if it is an .arrow file"
        raise DatasetError(url, f"not a readable table ({text})", remedy) from error
