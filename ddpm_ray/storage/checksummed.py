"""Objects of known sha256: their exact bytes, or an error.

Clients do not notice flipped bits and short bodies (s3fs accepted all of six damaged range reads).
Every object is therefore hashed here, and read again where the hash does not match.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError

Data = TypeVar("Data", bytes, bytes | memoryview)
READS = 5  # attempts before an object that does not match counts as damaged


class DamagedError(StorageError):
    """An object with other bytes than were written; args are (url, expected, found)."""

    def __str__(self) -> str:
        url, expected, found = self.args
        return sanitize(
            f"{url}: sha256 is {found[:12]}, expected {expected[:12]}, in each of {READS} "
            "reads; restore a complete copy"
        )


def read_verified(url: str, sha256: str, size_bytes: int = object_store.UNKNOWN_BYTES) -> bytes:
    """Read the whole object of that sha256; a reading that does not match is repeated.

    `size_bytes`, where known, sets the time limit. Raises DamagedError after READS readings that
    do not match, and StorageError.
    """
    return _verified(lambda: object_store.read_bytes(url, size_bytes), url, sha256)


def read_verified_view(url: str, sha256: str, size_bytes: int) -> bytes | memoryview:
    """Do the same as `read_verified` for an object of known size, with less CPU."""
    return _verified(lambda: object_store.read_sized(url, size_bytes), url, sha256)


def _verified(read: Callable[[], Data], url: str, sha256: str) -> Data:
    """Return the first reading of that sha256. Raises DamagedError after READS readings."""
    found = ""
    for _ in range(READS):
        data = read()
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise DamagedError(url, sha256, found)


def fetch(url: str, sha256: str, cache_dir: str | Path) -> Path:
    """Return a local path of the file of that sha256 at `url`. Raises StorageError.

    A local file stays where it is. A remote one is downloaded once into `cache_dir`, under a name
    that holds its hash. Either is hashed at each call.
    """
    if object_store.is_local(url):
        path, found = (
            object_store.local_path(url),
            hashlib.sha256(object_store.read_bytes(url)).hexdigest(),
        )
    else:
        path = Path(cache_dir).expanduser() / f"{sha256[:16]}-{object_store.name_of(url)}"
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
        data = object_store.read_bytes(url)
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            object_store.write_bytes(str(path), data)
    if found != sha256:
        remedy = "fetch the file again, or correct the sha256 if the file is the one you mean"
        raise StorageError(url, f"sha256 is {found}, expected {sha256}", remedy)
    return path
