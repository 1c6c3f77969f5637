"""Size and version of objects, by which a change of a packed source is noticed."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_store import with_retries
from ddpm_ray.storage.remote_filesystem import open_url, request


class ObjectState(NamedTuple):
    """Size and version of an object."""

    size: int  # in bytes
    version: str  # its ETag or modification time; empty where the store gives neither


@with_retries
def state(url: str) -> ObjectState:
    """Return size and version of one object. Raises StorageError."""
    if object_store.is_local(url):
        status = object_store.local_path(url).stat()
        return ObjectState(status.st_size, str(status.st_mtime_ns))
    filesystem, path = open_url(url)
    return _state(request(filesystem, "info", path))


@with_retries
def states(url: str) -> dict[str, ObjectState]:
    """Return size and version of every object below a remote `url`, hidden ones too, by path.

    Paths are relative. Raises StorageError where there is nothing. For local folders see
    data/packing/source_files.py.
    """
    filesystem, path = open_url(url)
    prefix = path.rstrip("/") + "/"
    found = request(filesystem, "find", path, detail=True)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "nothing there")
    names = {name.removeprefix(prefix): info for name, info in found.items()}
    return {name: _state(names[name]) for name in sorted(names) if not name.endswith("/")}


def _state(info: dict[str, Any]) -> ObjectState:
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    version = next((str(info[key]) for key in keys if info.get(key)), "")
    return ObjectState(int(info["size"] or 0), version)
