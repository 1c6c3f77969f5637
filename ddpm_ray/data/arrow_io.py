"""Write Arrow files of one batch deterministically; read them as untrusted input.

Arrow trusts a file: offsets that point outside their buffer, the size that a compressed buffer
claims, extension types that any package in this process registered. `parse_batch` therefore
accepts only one uncompressed batch of exactly the expected columns with every offset in range.
"""

from __future__ import annotations

import struct

import pyarrow as pa

PREFIX_BYTES = 8  # before the first message: ARROW1 and two bytes of padding
# Field numbers in Arrow's format/Message.fbs:
COMPRESSION = 3  # of a RecordBatch: its compression, unset if there is none
HEADER = 2  # of a Message: the RecordBatch


class ArrowFileError(ValueError):
    """Bytes that are not a valid file; the message is one line with the reason."""


def serialize_table(table: pa.Table) -> bytes:
    """Serialize a table of at least one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    return bytes(sink.getvalue())


def parse_batch(data: bytes | memoryview, *schemas: pa.Schema) -> pa.RecordBatch:
    """Return the batch in `data` without a copy.

    Its schema must equal one of `schemas` except metadata. Raises ArrowFileError.
    """
    try:
        stream = pa.py_buffer(data)[PREFIX_BYTES:]
        messages = pa.ipc.MessageReader.open_stream(stream)
        first_two = [messages.read_next_message() for _ in range(2)]
        kinds = [message.type for message in first_two]
        if kinds != ["schema", "record batch"]:
            raise ArrowFileError(f"it starts with {' and '.join(kinds)}")
        if is_compressed(first_two[1]):
            raise ArrowFileError("it is compressed, so its size in memory is unknown")
        reader = pa.ipc.open_stream(stream)
        if not any(reader.schema.equals(schema) for schema in schemas):
            expected = " or ".join(map(_columns, schemas))
            raise ArrowFileError(f"its columns are {_columns(reader.schema)}, not {expected}")
        batch = reader.read_next_batch()
        batch.validate(full=True)
    except ArrowFileError:
        raise
    except Exception as error:  # Arrow's own, and anything a registered extension type raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ArrowFileError(f"not an Arrow file ({text})") from error
    if any(column.null_count for column in batch.columns):
        raise ArrowFileError("it has null values")
    return batch


def is_compressed(message: pa.Message) -> bool:
    """Return whether the buffers of a record batch are compressed."""
    return _field(message.metadata, HEADER, COMPRESSION) != 0


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _field(message: pa.Buffer, *numbers: int) -> int:
    """Return the offset of a flatbuffer field, given its number in each nested table; 0: unset.

    Arrow has verified the buffer but has no API for these fields.
    """
    at = 0
    for number in numbers:
        table = at + struct.unpack_from("<I", message, at)[0]
        fields = table - struct.unpack_from("<i", message, table)[0]
        slot = 4 + 2 * number  # after the sizes of the vtable and of the table
        size = struct.unpack_from("<H", message, fields)[0]
        offset = struct.unpack_from("<H", message, fields + slot)[0] if slot < size else 0
        if not offset:
            return 0
        at = table + offset
    return at
