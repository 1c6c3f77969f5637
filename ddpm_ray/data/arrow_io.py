"""Arrow files of one batch: the same bytes every time, and read as what strangers wrote.

Arrow believes a file: an offset that leads out of its buffer, the size that a compressed buffer
will have, an extension type that some package in this process registered. So a file is one
uncompressed batch of exactly the columns expected, every offset in range, in memory, or an error.
"""

from __future__ import annotations

import struct

import pyarrow as pa

OPENING = 8  # bytes before the first message: ARROW1 and two of padding
COMPRESSION = 3  # the field of a RecordBatch in format/Message.fbs that says how, if at all
HEADER = 2  # the field of a Message that is the batch itself


class ArrowFileError(ValueError):
    """Bytes that are no such file; one line that says why."""


def write(table: pa.Table) -> bytes:
    """The file of a table that has at least one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))
    return bytes(sink.getvalue())


def read(data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in `data`, of this schema but for its metadata, without a copy. ArrowFileError."""
    try:
        stream = pa.py_buffer(data)[OPENING:]
        messages = pa.ipc.MessageReader.open_stream(stream)
        opening = [messages.read_next_message() for _ in range(2)]
        kinds = [message.type for message in opening]
        if kinds != ["schema", "record batch"]:
            raise ArrowFileError(f"it opens with {' and '.join(kinds)}")
        if is_compressed(opening[1]):
            raise ArrowFileError("it is compressed, and nobody knows how large it would become")
        reader = pa.ipc.open_stream(stream)
        if not reader.schema.equals(schema):
            raise ArrowFileError(
                f"its columns are {_columns(reader.schema)}, not {_columns(schema)}"
            )
        batch = reader.read_next_batch()
        batch.validate(full=True)
    except ArrowFileError:
        raise
    except Exception as error:  # Arrow's own, and whatever a registered extension type raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ArrowFileError(f"not an Arrow file ({text})") from error
    if any(column.null_count for column in batch.columns):
        raise ArrowFileError("it has empty cells")
    return batch


def is_compressed(message: pa.Message) -> bool:
    """Whether the buffers of a record batch are compressed."""
    return _field(message.metadata, HEADER, COMPRESSION) != 0


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _field(message: pa.Buffer, *numbers: int) -> int:
    """Where the field lies that these numbers lead to in a flatbuffer, table by table; 0: unset.

    Arrow has checked the buffer, but shows nothing of it.
    """
    at = 0
    for number in numbers:
        table = at + struct.unpack_from("<I", message, at)[0]
        fields = table - struct.unpack_from("<i", message, table)[0]
        slot = 4 + 2 * number  # behind the sizes of the list of fields and of the table
        size = struct.unpack_from("<H", message, fields)[0]
        offset = struct.unpack_from("<H", message, fields + slot)[0] if slot < size else 0
        if not offset:
            return 0
        at = table + offset
    return at
