"""Small JSON objects that vouch for themselves: {"format", "sha256", "value": ...}.

A bit that changed on the way is read again; one that changed in the store is an error, never a
number that happens to parse. The format is that of the value; see file_formats.py.
"""

import hashlib
import json
from typing import Any

from ddpm_ray.storage import object_store
from ddpm_ray.storage.checksummed import READS
from ddpm_ray.storage.file_formats import FORMAT, require_readable
from ddpm_ray.storage.object_store import StorageError


class SealError(StorageError):
    """An object whose seal does not match what it holds; args are (url, reason, remedy)."""


def write(url: str, value: Any, number: int = 1) -> None:
    """Put `value`, plain JSON of format `number`, at `url`, over what was there. StorageError."""
    object_store.write_bytes(url, sealed(value, number))


def write_new(url: str, value: Any, number: int = 1) -> bool:
    """As storage.write_new: False where another value is."""
    return object_store.write_new(url, sealed(value, number))


def read(url: str, newest: int = 1) -> Any:
    """The value at `url`, in a format up to `newest`.

    Raises SealError, StorageError where nothing can be read, and NewerFormatError.
    """
    reason = ""
    for _ in range(READS):
        try:
            held = json.loads(object_store.read_bytes(url))
            number = held.get(FORMAT, 1)
            if held["sha256"] == _digest(held["value"], number):
                require_readable(url, number, newest)
                return held["value"]
            reason = "its sha256 is not that of its value"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"it is no sealed object ({type(error).__name__})"  # "[[[[..." recurses
    raise SealError(url, reason, "put a whole copy of it back; it is not to be edited by hand")


def sealed(value: Any, number: int = 1) -> bytes:
    """The bytes of a sealed object."""
    held = {FORMAT: number, "sha256": _digest(value, number), "value": value}
    return (json.dumps(held, indent=1) + "\n").encode()


def _digest(value: Any, number: int) -> str:
    """Of the value, not of its layout; and of its format, above the one that files did not name."""
    held = value if number == 1 else {FORMAT: number, "value": value}
    text = json.dumps(held, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
