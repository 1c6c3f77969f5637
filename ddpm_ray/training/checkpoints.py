"""Checkpoints that a crash at any point leaves whole: data first, then manifest, then pointer.

    <url>/latest.json                       the pointer: folders and manifest hashes, newest first
    <url>/step-00000500-3f2a91c4/           one attempt's own folder, never written twice
        model.safetensors ema.safetensors optimizer.safetensors state.json
        manifest.json                       sizes and sha256 of the four, written after them

A folder that the pointer does not name does not exist. Readers follow the pointer, verify every
byte and fall back to the one before; they never list. There is no pickle anywhere.
"""

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray.data import storage
from ddpm_ray.data.storage import StorageError
from ddpm_ray.training.state import Snapshot

log = logging.getLogger(__name__)

POINTER = "latest.json"
MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted or found; args are (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return f"{url}: {reason}; {remedy}"


@dataclass(frozen=True)
class Reference:
    """One committed checkpoint, as the pointer names it."""

    folder: str
    manifest_sha256: str


class CheckpointStore:
    """The checkpoints below `url` of one run; one writer at a time, any number of readers."""

    def __init__(self, url: str, keep: int = 3) -> None:
        self.url, self.keep = url, keep

    def save(self, snapshot: Snapshot) -> str:
        """URL of the committed checkpoint folder; raises StorageError, and then commits nothing."""
        folder = f"step-{snapshot.step:08d}-{secrets.token_hex(4)}"
        where = storage.join(self.url, folder)
        files = {f"{group}.safetensors": safetensors.save(snapshot.tensors[group])
                 for group in GROUPS}  # fmt: skip
        files[STATE] = _json(snapshot.facts)
        manifest = _json(
            {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        )
        kept = [Reference(folder, _sha256(manifest)), *self._references()]
        pointer = _json([vars(reference) for reference in kept[: self.keep]])
        try:
            for name, data in (*files.items(), (MANIFEST, manifest)):
                storage.write_bytes(storage.join(where, name), data)
        except StorageError:
            self._delete(kept[0])  # half of it on a full disk would only be in the way
            raise
        storage.write_bytes(storage.join(self.url, POINTER), pointer)
        for old in kept[self.keep :]:
            self._delete(old)
        return where

    def load(self) -> tuple[str, Snapshot] | None:
        """The newest checkpoint that verifies and its folder's URL; None where none was committed.

        Falls back, with a warning, past damaged ones. Raises CheckpointError if all are: to start
        a month's run again from nothing in silence would be worse; and StorageError in an outage.
        """
        references = self._references()
        reasons = []
        for reference in references:
            where = storage.join(self.url, reference.folder)
            try:
                return where, read(where, reference.manifest_sha256)
            except (CheckpointError, StorageError) as error:
                if isinstance(error, StorageError) and self._is_whole(reference):
                    raise  # the storage is away, not the checkpoint: that passes, try again
                log.warning("%s; falling back to the checkpoint before it", error)
                reasons.append(str(error))
        if references:
            remedy = "restore one of them from a backup, or start a run under another name"
            raise CheckpointError(self.url, f"no checkpoint verifies ({reasons[0]})", remedy)
        return None

    def _references(self) -> list[Reference]:
        pointer = storage.join(self.url, POINTER)
        if not storage.exists(pointer):
            return []
        try:
            entries = json.loads(storage.read_bytes(pointer))
            if not entries:  # a save never writes that; to take it would start from nothing
                raise ValueError
            return [Reference(**entry) for entry in entries]
        except (ValueError, TypeError) as error:
            remedy = "restore it from a backup; it lists the checkpoint folders beside it"
            raise CheckpointError(pointer, "is not a list of checkpoints", remedy) from error

    def _is_whole(self, reference: Reference) -> bool:
        where = storage.join(self.url, reference.folder)
        return all(storage.exists(storage.join(where, name)) for name in (MANIFEST, *file_names()))

    def _delete(self, reference: Reference) -> None:
        """Best effort: what stays behind costs space and nothing else."""
        where = storage.join(self.url, reference.folder)
        try:
            for name in (MANIFEST, *file_names()):
                storage.delete(storage.join(where, name))
            storage.delete_empty_folder(where)
        except StorageError as error:
            log.warning("old checkpoint stays: %s", error)


def read(url: str, manifest_sha256: str | None = None, groups: Sequence[str] = GROUPS) -> Snapshot:
    """The checkpoint in the folder `url`, every byte that is read verified; raises CheckpointError.

    Without `manifest_sha256` (a folder that a person named) the manifest vouches for itself. To
    sample, `groups=("ema",)` is enough: a quarter of the bytes.
    """
    manifest = storage.read_bytes(storage.join(url, MANIFEST))
    if manifest_sha256 not in (None, _sha256(manifest)):
        raise _damaged(url, MANIFEST, "its sha256 is not the pointer's")
    try:
        expected: dict[str, dict[str, Any]] = json.loads(manifest)
        files = {name: _verified(url, name, expected[name]) for name in file_names(groups)}
        tensors = {group: safetensors.load(files[f"{group}.safetensors"]) for group in groups}
        return Snapshot(tensors, json.loads(files[STATE]))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(url, MANIFEST, f"cannot be understood ({error!r})") from error


def file_names(groups: Sequence[str] = GROUPS) -> list[str]:
    """Names of the files that the manifest vouches for: these groups' tensors and the facts."""
    return [*(f"{group}.safetensors" for group in groups), STATE]


def weights_sha256(url: str, group: str = "ema") -> str:
    """sha256 of the weights file of the checkpoint folder `url`, as its manifest records it."""
    manifest = json.loads(storage.read_bytes(storage.join(url, MANIFEST)))
    return str(manifest[f"{group}.safetensors"]["sha256"])


class CheckpointWriter:
    """Saves snapshots in a background thread, one at a time, off the step path."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.committed: str | None = None  # URL of the newest committed folder

    def submit(self, snapshot: Snapshot) -> None:
        """Start saving; waits for the save before it, and raises what that one raised."""
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once the last submitted snapshot is committed; raises what its save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, snapshot: Snapshot) -> None:
        try:
            self.committed = self.store.save(snapshot)
        except Exception as error:  # noqa: BLE001 - handed to the training thread, whole
            self._error = error


def _verified(url: str, name: str, entry: dict[str, Any]) -> bytes:
    data = storage.read_bytes(storage.join(url, name))
    if len(data) != entry["bytes"]:
        raise _damaged(url, name, f"has {len(data)} bytes, the manifest says {entry['bytes']}")
    if _sha256(data) != entry["sha256"]:
        raise _damaged(url, name, "its sha256 is not the manifest's")
    return data


def _damaged(url: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        storage.join(url, name), reason, "the bytes changed since they were saved"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
