"""One checkpoint: a folder of files and their manifest, written by name and verified when read.

The tensors are safetensors and the rest is JSON; no file is a pickle. The manifest has the format
number, and size and sha256 of each other file. A large group is several files: see
checkpoint_parts.py. checkpoints.py says when a folder is committed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray import fault_injection
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import checksummed, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.errors import NotAnObjectError
from ddpm_ray.storage.file_formats import FORMAT, require_readable
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.tensor_file import file_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")  # of tensors that each checkpoint has
# Formats of a checkpoint's folder: each group is a file; some are split. Earlier versions read the
# first alone, so it is kept where nothing is split.
WHOLE_FORMAT, SPLIT_FORMAT = 1, 2
NEWEST_FORMAT = SPLIT_FORMAT
TENSORS = ".safetensors"
TENSOR_FILE = re.compile(r"([a-z][a-z0-9.-]*)\.safetensors")
Entries = dict[str, dict[str, Any]]  # of a manifest: size and sha256 by file name
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
        entries = {name: expected[name] for name in [*_tensor_files(expected, groups), STATE]}
        return [
            ListedFile(name, int(entry["bytes"]), entry["sha256"])
            for name, entry in entries.items()
        ]
    except MALFORMED as error:
        raise _malformed(url, error) from error


def sampling_files(url: str) -> list[str]:
    """Names of the files in the folder `url` that sampling needs. Raises as `listed_files`."""
    return [MANIFEST, *(file.name for file in listed_files(url, groups=("ema",)))]


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
                group = tensors.setdefault(checkpoint_parts.group_of(match[1]), {})
                found = safetensors.load(data)
                if twice := found.keys() & group.keys():
                    raise ValueError(f"{min(twice)} is in two files")
                group |= found
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


def write_checkpoint(url: str, snapshot: Snapshot, others: Callable[[], Entries] = dict) -> bytes:
    """Write a checkpoint to the folder `url`, the manifest last; return the manifest.

    `others` waits for files that other workers write there, and returns their entries. Raises
    ValueError before any write if facts are not JSON, and StorageError.
    """
    facts = _json(snapshot.facts)
    entries = write_tensors(url, snapshot.tensors)
    _write_object(url, STATE, facts)
    entries |= {STATE: _entry(facts)} | others()
    split = checkpoint_parts.is_split(_stems(entries))
    manifest = _json({FORMAT: SPLIT_FORMAT if split else WHOLE_FORMAT} | entries)
    fault_injection.at("manifest")
    object_store.write_bytes(object_store.join(url, MANIFEST), manifest)
    return manifest


def write_tensors(url: str, tensors: Mapping[str, Tensors]) -> Entries:
    """Write the files of `tensors` to the folder `url`; return their manifest entries.

    `tensors`: by group or by file. Raises StorageError.
    """
    entries = {}
    for name, data in tensor_files(tensors):
        _write_object(url, name, data)
        entries[name] = _entry(data)
    return entries


def tensor_files(tensors: Mapping[str, Tensors]) -> Iterator[tuple[str, memoryview]]:
    """Yield name and bytes of each file of `tensors`, one in memory at a time.

    The bytes are the memory of the tensors, not copies, if they are packed as this file.
    """
    for name, part in checkpoint_parts.split(tensors).items():
        yield f"{name}{TENSORS}", file_bytes(part)


def described(files: Iterable[tuple[str, memoryview]]) -> Entries:
    """Return the manifest entry of each file: size in bytes and sha256."""
    return {name: _entry(data) for name, data in files}


def group_names(url: str) -> list[str]:
    """Tensor groups of the checkpoint folder `url`, according to its manifest."""
    return sorted({*map(checkpoint_parts.group_of, _stems(_manifest(url)))})


def weights_sha256(url: str, group: str = "ema") -> str:
    """sha256 of the weights of the checkpoint folder `url`, according to its manifest."""
    return group_sha256(_manifest(url), group)


def group_sha256(entries: Entries, group: str = "ema") -> str:
    """sha256 of the file of `group`; of the hexadecimal sha256 of all its files if it is split."""
    files = checkpoint_parts.files_of_group(group, _stems(entries))
    digests = [str(entries[f"{name}{TENSORS}"]["sha256"]) for name in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _tensor_files(entries: Iterable[str], groups: Sequence[str] | None = None) -> list[str]:
    """Files of those of `groups` (None: all) that a manifest with these names has.

    Raises KeyError if one is missing, or a group that each checkpoint has.
    """
    stems = _stems(entries)
    held = sorted({*GROUPS, *map(checkpoint_parts.group_of, stems)})
    wanted = held if groups is None else [group for group in groups if group in held]
    return [
        f"{stem}{TENSORS}"
        for group in wanted
        for stem in checkpoint_parts.files_of_group(group, stems)
    ]


def _stems(names: Iterable[str]) -> list[str]:
    """Names without suffix of the tensor files named in a manifest, of its own folder only."""
    return [match[1] for match in map(TENSOR_FILE.fullmatch, names) if match]


def _manifest(url: str) -> Entries:
    found: Entries = json.loads(object_store.read_bytes(object_store.join(url, MANIFEST)))
    return found


def _write_object(url: str, name: str, data: bytes | memoryview) -> None:
    fault_injection.at("object")
    object_store.write_bytes(object_store.join(url, name), data)


def _entry(data: bytes | memoryview) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _damaged(url: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        object_store.join(url, name), reason, "the bytes changed since they were saved"
    )


def _malformed(url: str, error: Exception) -> CheckpointError:
    return _damaged(url, MANIFEST, f"cannot be understood ({error!r})")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
