"""Objects whose sha256 is known: their bytes, or an error, never other bytes.

A client takes flipped bits and short bodies in silence (of six damaged range reads s3fs accepted
all), so whatever is used is hashed here, and read again where the way changed it.
"""

import hashlib
from pathlib import Path

from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_store import StorageError

READS = 5  # of an object that does not match, before it is called damaged


class DamagedError(StorageError):
    """An object whose bytes are not those that were put there; args are (url, expected, found)."""

    def __str__(self) -> str:
        url, expected, found = self.args
        return sanitize(
            f"{url}: sha256 is {found[:12]}, expected {expected[:12]}, in each of {READS} "
            "readings; put a whole copy of it back"
        )


def read(url: str, sha256: str, size_bytes: int = object_store.UNKNOWN_BYTES) -> bytes:
    """The whole object, whose sha256 is as told: read again where the way here changed it.

    Raises DamagedError after READS readings that all differ, and StorageError.
    """
    found = ""
    for _ in range(READS):
        data = object_store.read_bytes(url, size_bytes)
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise DamagedError(url, sha256, found)


def fetch(url: str, sha256: str, cache_dir: str | Path) -> Path:
    """A local path of the file at `url` whose sha256 is as told; raises StorageError otherwise.

    A local file is checked where it is. Another is downloaded once into `cache_dir`, under a name
    that holds its hash, and is checked again at each call.
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
