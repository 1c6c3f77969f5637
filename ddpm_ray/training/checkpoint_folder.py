"""One checkpoint: a folder of files and their manifest, written by name and verified when read.

The tensors are safetensors and the rest is JSON; no file is a pickle. The manifest has the format
number, and size and sha256 of each other file. checkpoints.py says when a folder is committed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import checksummed, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.errors import NotAnObjectError
from ddpm_ray.storage.file_formats import FORMAT, require_readable
from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.tensor_file import file_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")  # of tensors that each checkpoint has
NEWEST_FORMAT = 1  # of a checkpoint's folder
TENSORS = ".safetensors"
TENSOR_FILE = re.compile(r"([a-z][a-z0-9.-]*)\.safetensors")
# What JSON and tensors of another shape than expected raise.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or missing; args are (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


def read_checkpoint(
    url: str, manifest_sha256: str | None = None, groups: Sequence[str] | None = None
) -> Snapshot:
    """Read and verify the checkpoint in the folder `url`.

    Without `manifest_sha256` (a folder given by the user) the manifest itself is not verified.
    `groups`: tensor groups to read, of those it has (None: all); sampling needs `("ema",)`, and
    `()` reads only the JSON. Raises CheckpointError, StorageError, and NewerFormatError, for which
    readers must not fall back to an older checkpoint: the newest steps would be lost.
    """
    listed = listed_files(url, manifest_sha256, groups)
    return decoded(url, listed, lambda file: read_file(url, file))


class ListedFile(NamedTuple):
    """A file of a checkpoint folder, as the manifest lists it."""

    name: str
    size: int  # in bytes
    sha256: str


def listed_files(
    url: str, manifest_sha256: str | None = None, groups: Sequence[str] | None = None
) -> list[ListedFile]:
    """Read the manifest of the folder `url`: the files of `groups` and the JSON. See above."""
    try:
        where = object_store.join(url, MANIFEST)
        manifest = (
            checksummed.read_verified(where, manifest_sha256)
            if manifest_sha256
            else object_store.read_bytes(where)
        )
    except DamagedError:
        raise _damaged(url, MANIFEST, "its sha256 is not the pointer's") from None
    try:
        expected: dict[str, Any] = json.loads(manifest)
        require_readable(where, expected.get(FORMAT), NEWEST_FORMAT)
        held = sorted({*GROUPS, *_groups(expected)})
        groups = held if groups is None else [group for group in groups if group in held]
        entries = {name: expected[name] for name in checkpoint_files(groups)}
        return [
            ListedFile(name, int(entry["bytes"]), entry["sha256"])
            for name, entry in entries.items()
        ]
    except MALFORMED as error:
        raise _malformed(url, error) from error


def read_file(url: str, file: ListedFile) -> bytes:
    """Read and verify one file of the folder `url`. Raises CheckpointError and StorageError."""
    try:
        return checksummed.read_verified(object_store.join(url, file.name), file.sha256, file.size)
    except DamagedError:
        raise _damaged(url, file.name, "its sha256 is not the manifest's") from None


def decoded(
    url: str, listed: Sequence[ListedFile], read: Callable[[ListedFile], bytes]
) -> Snapshot:
    """Make a snapshot of the files that `read` returns, one in memory at a time."""
    tensors: dict[str, Tensors] = {}
    facts: dict[str, Any] = {}
    try:
        for file in listed:
            data = read(file)
            if match := TENSOR_FILE.fullmatch(file.name):
                tensors[match[1]] = safetensors.load(data)
            else:
                facts = json.loads(data)
    except MALFORMED as error:
        raise _malformed(url, error) from error
    return Snapshot(tensors, facts)


def read_manifest(where: str) -> bytes | None:
    """Read the manifest of the folder `where`; None if the save did not complete."""
    place = object_store.join(where, MANIFEST)
    try:
        data = object_store.read_bytes(place) if object_store.exists(place) else b""
        return data if isinstance(json.loads(data), dict) else None
    except (ValueError, RecursionError, NotAnObjectError):
        return None


def objects(snapshot: Snapshot) -> dict[str, bytes | memoryview]:
    """Return the files of a checkpoint folder by name, in writing order: the manifest is last.

    Files of tensors are the memory of the snapshot, not copies.
    """
    groups = snapshot.tensors.items()
    files: dict[str, bytes | memoryview] = {
        f"{group}{TENSORS}": file_bytes(tensors) for group, tensors in groups
    }
    files[STATE] = _json(snapshot.facts)
    return files | {MANIFEST: _json({FORMAT: NEWEST_FORMAT} | described(files))}


def described(files: Mapping[str, bytes | memoryview]) -> dict[str, dict[str, Any]]:
    """Return the manifest entry of each file: size in bytes and sha256."""
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }


def checkpoint_files(groups: Sequence[str] = GROUPS) -> list[str]:
    """Names of the files in the manifest: the tensors of these groups, and the JSON."""
    return [*(f"{group}{TENSORS}" for group in groups), STATE]


def _groups(names: Iterable[str]) -> Iterator[str]:
    """Groups of the tensor files named in a manifest, of its own folder only."""
    return (match[1] for match in map(TENSOR_FILE.fullmatch, names) if match)


def group_names(url: str) -> list[str]:
    """Tensor groups of the checkpoint folder `url`, according to its manifest."""
    return sorted(_groups(json.loads(object_store.read_bytes(object_store.join(url, MANIFEST)))))


def weights_sha256(url: str, group: str = "ema") -> str:
    """sha256 of the weights file of the checkpoint folder `url`, according to its manifest."""
    manifest = json.loads(object_store.read_bytes(object_store.join(url, MANIFEST)))
    return str(manifest[f"{group}{TENSORS}"]["sha256"])


def _damaged(url: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        object_store.join(url, name), reason, "the bytes changed since they were saved"
    )


def _malformed(url: str, error: Exception) -> CheckpointError:
    return _damaged(url, MANIFEST, f"cannot be understood ({error!r})")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
