"""Captions of samples: their column in Arrow files.

A sample has 0 to MAX_CAPTIONS captions. The packer cleans them with `cleaned`, and the parser of
shards refuses a caption that `cleaned` would change, so each text in memory follows the same rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ddpm_ray.config.caption_rule import MAX_CAPTION_BYTES, CaptionError, cleaned
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.redaction import sanitize

MAX_CAPTIONS = 64  # of one sample
COLUMN_TYPE = pa.list_(pa.string())


def caption_column(captions: Sequence[Sequence[str]]) -> pa.ListArray:
    """Return the column of a shard from the captions of each sample."""
    return pa.array(captions, COLUMN_TYPE)


def caption_tuples(column: pa.ListArray) -> list[tuple[str, ...]]:
    """Return the captions of each row of a column of lists of strings."""
    texts = column.flatten().to_numpy(zero_copy_only=False).tolist()
    found, start = [], 0
    for count in pc.list_value_length(column).to_pylist():
        found.append(tuple(texts[start : start + count]))
        start += count
    return found


def caption_bytes(column: pa.ListArray) -> npt.NDArray[np.int64]:
    """Return the bytes of all captions of each row, [n]."""
    sizes = pc.binary_length(column.flatten()).to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.diff(before[ends], prepend=0)


def captions_digest(column: pa.ListArray) -> bytes:
    """Return the sha256 of the captions of all rows: their counts, then one caption a line."""
    digest = hashlib.sha256(np.asarray(pc.list_value_length(column), dtype="<i8").tobytes())
    digest.update("\n".join(column.flatten().to_numpy(zero_copy_only=False)).encode())
    return digest.digest()


def require_captions(column: pa.ListArray) -> None:
    """Check every caption of a shard's column. Raises ArrowFileError."""
    texts = column.flatten()
    if texts.null_count:
        raise ArrowFileError("it has null values in captions")
    if (most := pc.max(pc.list_value_length(column)).as_py()) > MAX_CAPTIONS:
        raise ArrowFileError(f"a sample has {most} captions; at most {MAX_CAPTIONS} are allowed")
    for text in texts.to_numpy(zero_copy_only=False):
        # True for most captions, and several times faster than `cleaned`.
        plain = text.isascii() and text.isprintable() and text.strip() == text
        if not (plain and 0 < len(text) <= MAX_CAPTION_BYTES):
            _require_clean(text)


def _require_clean(text: str) -> None:
    """Raise ArrowFileError for a text that packing does not store as a caption."""
    try:
        clean = cleaned(text)
    except CaptionError as error:
        raise ArrowFileError(f"a caption is invalid: {error.args[0]}") from None
    if not text:
        raise ArrowFileError("a caption is empty")
    if clean != text:
        raise ArrowFileError(
            f"a caption is not in NFC, or has white space around it: {sanitize(ascii(text[:40]))}"
        )
