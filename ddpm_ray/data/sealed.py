"""Small JSON objects that vouch for themselves: {"sha256": of the value, "value": ...}.

A bit that changed on the way is read again; one that changed in the store is an error, never a
number that happens to parse.
"""

import hashlib
import json
from typing import Any

from ddpm_ray.data import storage
from ddpm_ray.data.storage import StorageError
from ddpm_ray.data.verified import READS


class SealError(StorageError):
    """An object whose seal does not match what it holds; args are (url, reason, remedy)."""


def write(url: str, value: Any) -> None:
    """Put `value`, plain JSON, at `url`, over what was there. Raises StorageError."""
    storage.write_bytes(url, sealed(value))


def write_new(url: str, value: Any) -> bool:
    """As storage.write_new: False where another value is."""
    return storage.write_new(url, sealed(value))


def read(url: str) -> Any:
    """The value at `url`. Raises SealError, or StorageError where nothing can be read."""
    reason = ""
    for _ in range(READS):
        try:
            held = json.loads(storage.read_bytes(url))
            if held["sha256"] == _digest(held["value"]):
                return held["value"]
            reason = "its sha256 is not that of its value"
        except (ValueError, TypeError, KeyError, RecursionError) as error:  # "[[[[..." recurses
            reason = f"it is no sealed object ({type(error).__name__})"
    raise SealError(url, reason, "put a whole copy of it back; it is not to be edited by hand")


def sealed(value: Any) -> bytes:
    """The bytes of a sealed object."""
    held = {"sha256": _digest(value), "value": value}
    return (json.dumps(held, indent=1) + "\n").encode()


def _digest(value: Any) -> str:
    """Of the value, not of its layout."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
