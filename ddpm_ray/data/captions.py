"""Captions of samples: the rule that each of them follows, and their column in Arrow files.

A sample has 0 to MAX_CAPTIONS captions. The packer cleans them with `cleaned`, and the parser of
shards refuses a caption that `cleaned` would change, so each text in memory follows the same rule.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.redaction import counted, sanitize

MAX_CAPTIONS = 64  # of one sample
MAX_CAPTION_BYTES = 4096  # of UTF-8, of one caption
COLUMN_TYPE = pa.list_(pa.string())
# Normalisation to NFC makes no text shorter than a third: three letters of Hangul have 9 bytes and
# their syllable has 3. Longer texts are refused first, as its time may grow with the square.
_MAX_RAW_BYTES = 3 * MAX_CAPTION_BYTES
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc

TOO_LONG = f"captions of more than {MAX_CAPTION_BYTES} bytes"
CONTROL = "captions with control characters"
NOT_UNICODE = "captions that are not valid Unicode"


class CaptionError(ValueError):
    """A text that cannot be a caption; args are (problem, remedy, kind of problem)."""

    def __str__(self) -> str:
        problem, remedy, _ = self.args
        return sanitize(f"{problem}; {remedy}")

    @property
    def kind(self) -> str:
        """Name under which a report counts it: TOO_LONG, CONTROL or NOT_UNICODE."""
        return str(self.args[2])


def cleaned(text: str) -> str:
    """Return `text` as a caption: in NFC, without white space around it; it may be empty.

    Raises CaptionError for more than MAX_CAPTION_BYTES of UTF-8, for control characters, line ends
    included, and for lone surrogates, which UTF-8 cannot store.
    """
    text = text.strip()
    if _utf8_bytes(text) <= _MAX_RAW_BYTES:
        text = unicodedata.normalize("NFC", text)
    if (size := _utf8_bytes(text)) > MAX_CAPTION_BYTES:
        problem = f"the caption has {counted(size, 'byte')} of UTF-8"
        raise CaptionError(problem, f"shorten it to at most {MAX_CAPTION_BYTES} bytes", TOO_LONG)
    if found := _CONTROL.search(text):
        problem = f"the caption holds the control character U+{ord(found[0]):04X}"
        raise CaptionError(problem, "replace it by a space", CONTROL)
    return text


def _utf8_bytes(text: str) -> int:
    """Return the length of `text` in UTF-8. Raises CaptionError."""
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        problem = f"the caption holds half a surrogate pair, U+{ord(text[error.start]):04X}"
        raise CaptionError(problem, "write the character as one code point", NOT_UNICODE) from None


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
