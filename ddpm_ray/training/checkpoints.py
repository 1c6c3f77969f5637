"""Checkpoints that a crash at any point leaves whole: data first, then manifest, then pointer.

    <url>/latest.json                       the pointer: folders and manifest hashes, newest first
    <url>/previous.json                     what it said before
    <url>/step-00000500-3f2a91c4/           one attempt's own folder, never written twice
        model.safetensors ema.safetensors optimizer.safetensors state.json
        manifest.json                       sizes and sha256 of the four, written after them

A folder that the pointer does not name does not exist. Readers follow the pointer, verify every
byte and fall back to the one before; they never list. There is no pickle anywhere. Who may move the
pointer is lease.py's.
"""

import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray import faults
from ddpm_ray.data import sealed, storage, verified
from ddpm_ray.data.sealed import SealError
from ddpm_ray.data.storage import StorageError
from ddpm_ray.data.verified import DamagedError
from ddpm_ray.telling import told
from ddpm_ray.training.background import Background
from ddpm_ray.training.lease import Lease
from ddpm_ray.training.state import Snapshot

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # below a run's folder
POINTER, BEFORE = "latest.json", "previous.json"
MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")  # of tensors that each checkpoint has
TENSORS = ".safetensors"
TENSOR_FILE = re.compile(r"([a-z][a-z0-9.-]*)\.safetensors")
PREFIX = "step-"  # of a checkpoint's folder
FOLDER = re.compile(PREFIX + "[0-9]{8,}-[0-9a-f]{8}")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted or found; args are (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return told(f"{url}: {reason}; {remedy}")


@dataclass(frozen=True)
class Reference:
    """One committed checkpoint, as the pointer names it."""

    folder: str
    manifest_sha256: str

    @property
    def step(self) -> int:
        """The optimiser steps that its state has taken."""
        return int(self.folder.removeprefix(PREFIX).partition("-")[0])


@dataclass(frozen=True)
class Pointer:
    """What the pointer says."""

    epoch: int = 0  # the lease of who wrote it
    references: list[Reference] = field(default_factory=list)  # newest first

    @classmethod
    def of(cls, value: Any) -> "Pointer":
        """From JSON; raises TypeError, KeyError or ValueError for anything else."""
        if not value["checkpoints"]:  # a save never writes that; to take it would start anew
            raise ValueError
        references = [Reference(**entry) for entry in value["checkpoints"]]
        # Folders are read and, once they are old, deleted: a name that leads out of here is none.
        if not all(FOLDER.fullmatch(reference.folder) for reference in references):
            raise ValueError
        return cls(int(value["epoch"]), references)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"epoch": self.epoch, "checkpoints": [vars(one) for one in self.references]}


class CheckpointStore:
    """The checkpoints below `url` of one run; one writer at a time, any number of readers.

    A writer leads by a lease; without one (tests, tools) nobody stands in its way.
    """

    def __init__(self, url: str, keep: int = 3, planned_every: int = 0) -> None:
        self.url, self.keep = url, keep  # the newest steps that are kept
        self.planned_every = planned_every  # steps; the newest multiple of it is kept as well
        self.lease: Lease | None = None
        self._verified: Reference | None = None  # the newest that was read back whole

    def lead(self, lease: Lease) -> None:
        """Commit by this lease; what earlier starts left half done, and can no more end, goes."""
        self.lease = lease
        known = {reference.folder for reference in self.pointer().references}
        try:
            for folder in storage.folders(self.url):
                if folder.startswith(PREFIX) and folder not in known:
                    storage.delete_folder(storage.join(self.url, folder))
        except StorageError as error:
            log.warning("half a checkpoint of an earlier start may stay: %s", error)

    def save(self, snapshot: Snapshot) -> str:
        """URL of the committed checkpoint folder; raises StorageError, and then commits nothing."""
        folder = f"{PREFIX}{snapshot.step:08d}-{secrets.token_hex(4)}"
        where = storage.join(self.url, folder)
        files = objects(snapshot)
        before = self.pointer()
        known = [Reference(folder, _sha256(files[MANIFEST])), *before.references]
        kept = self._kept(known)
        try:
            for name, data in files.items():
                faults.at("manifest" if name == MANIFEST else "object")
                storage.write_bytes(storage.join(where, name), data)
        except StorageError:
            self._delete(known[0])  # half of it on a full disk would only be in the way
            raise
        faults.at("commit")
        if self.lease is not None:
            self.lease.check()
        if before.references:
            sealed.write(storage.join(self.url, BEFORE), before.to_json())
        epoch = self.lease.epoch if self.lease else before.epoch
        sealed.write(storage.join(self.url, POINTER), Pointer(epoch, kept).to_json())
        faults.at("retire")
        for old in before.references:
            if old not in kept:
                self._delete(old)
        return where

    def load(self, groups: Sequence[str] | None = None) -> tuple[str, Snapshot] | None:
        """The newest checkpoint that verifies and its folder's URL; None where none was committed.

        Of its tensors all are read, or these `groups` alone; one that it lacks is left out.
        Falls back, with a warning, past damaged ones. Raises CheckpointError if all are: to start
        a month's run again from nothing in silence would be worse; and StorageError in an outage.
        """
        references = self.pointer().references
        reasons = []
        for reference in references:
            where = storage.join(self.url, reference.folder)
            try:
                found = where, read(where, reference.manifest_sha256, groups)
                if groups is None:
                    self._verified = reference
                return found
            except (CheckpointError, StorageError) as error:
                if isinstance(error, StorageError) and self._is_whole(reference):
                    raise  # the storage is away, not the checkpoint: that passes, try again
                log.warning("%s; falling back to the checkpoint before it", error)
                reasons.append(str(error))
        if references:
            remedy = "restore one of them from a backup, or start a run under another name"
            raise CheckpointError(self.url, f"no checkpoint verifies ({reasons[0]})", remedy)
        return None

    def at(self, step: int) -> str | None:
        """URL of the committed checkpoint of `step`; None where it is not kept."""
        start = f"{PREFIX}{step:08d}-"
        folders = (reference.folder for reference in self.pointer().references)
        found = next((folder for folder in folders if folder.startswith(start)), None)
        return None if found is None else storage.join(self.url, found)

    def pointer(self) -> Pointer:
        """The pointer; where it is damaged, with a warning, what it said before."""
        problem: Exception | None = None
        for name in (POINTER, BEFORE):
            where = storage.join(self.url, name)
            if not storage.exists(where):
                continue
            try:
                pointer = Pointer.of(sealed.read(where))
            except (SealError, ValueError, TypeError, KeyError) as error:
                problem = problem or error
                continue
            if name == BEFORE:
                log.warning(
                    "%s/%s is lost or damaged; taking what it said before", self.url, POINTER
                )
            return pointer
        if problem is None:
            return Pointer()
        remedy = "restore it from a backup; it lists the checkpoint folders beside it"
        where = storage.join(self.url, POINTER)
        raise CheckpointError(where, "is not a list of checkpoints", remedy) from problem

    def _kept(self, known: Sequence[Reference]) -> list[Reference]:
        """Those of `known`, newest first, that stay: the newest of each of the last `keep` steps,
        the newest planned one, to which a run that diverges goes back, and the one of which we
        know that it can be read."""
        newest: dict[int, Reference] = {}
        for one in known:
            newest.setdefault(one.step, one)
        of_steps, every = list(newest.values()), self.planned_every
        planned = [one for one in of_steps if every and one.step % every == 0]
        wanted = [*of_steps[: self.keep], *planned[:1], self._verified]
        return [one for one in known if one in wanted]

    def _is_whole(self, reference: Reference) -> bool:
        where = storage.join(self.url, reference.folder)
        return all(storage.exists(storage.join(where, name)) for name in (MANIFEST, *file_names()))

    def _delete(self, reference: Reference) -> None:
        """Best effort: what stays behind costs space and nothing else."""
        where = storage.join(self.url, reference.folder)
        try:
            storage.delete_folder(where)
        except StorageError as error:
            log.warning("old checkpoint stays: %s", error)


def read(
    url: str, manifest_sha256: str | None = None, groups: Sequence[str] | None = None
) -> Snapshot:
    """The checkpoint in the folder `url`, every byte that is read verified; raises CheckpointError.

    Without `manifest_sha256` (a folder that a person named) the manifest vouches for itself. All
    groups of tensors are read, or those named that it has: to sample, `groups=("ema",)` is enough,
    and `groups=()` reads the facts alone.
    """
    try:
        where = storage.join(url, MANIFEST)
        manifest = (
            verified.read(where, manifest_sha256) if manifest_sha256 else storage.read_bytes(where)
        )
    except DamagedError:
        raise _damaged(url, MANIFEST, "its sha256 is not the pointer's") from None
    try:
        expected: dict[str, dict[str, Any]] = json.loads(manifest)
        held = sorted({*GROUPS, *_groups(expected)})
        groups = held if groups is None else [group for group in groups if group in held]
        files = {name: _verified(url, name, expected[name]) for name in file_names(groups)}
        tensors = {group: safetensors.load(files[f"{group}{TENSORS}"]) for group in groups}
        return Snapshot(tensors, json.loads(files[STATE]))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(url, MANIFEST, f"cannot be understood ({error!r})") from error


def objects(snapshot: Snapshot) -> dict[str, bytes]:
    """A checkpoint folder's files by name, in the order of writing: the manifest comes last."""
    files = {f"{group}{TENSORS}": safetensors.save(tensors)
             for group, tensors in snapshot.tensors.items()}  # fmt: skip
    files[STATE] = _json(snapshot.facts)
    return files | {MANIFEST: _json(described(files))}


def described(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file: its size in bytes and its sha256."""
    return {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}


def file_names(groups: Sequence[str] = GROUPS) -> list[str]:
    """Names of the files that the manifest vouches for: these groups' tensors and the facts."""
    return [*(f"{group}{TENSORS}" for group in groups), STATE]


def _groups(names: Iterable[str]) -> Iterator[str]:
    """Of the files that a manifest names, as far as they lie in its own folder."""
    return (match[1] for match in map(TENSOR_FILE.fullmatch, names) if match)


def group_names(url: str) -> list[str]:
    """The groups of tensors in the checkpoint folder `url`, as its manifest names them."""
    return sorted(_groups(json.loads(storage.read_bytes(storage.join(url, MANIFEST)))))


def weights_sha256(url: str, group: str = "ema") -> str:
    """sha256 of the weights file of the checkpoint folder `url`, as its manifest records it."""
    manifest = json.loads(storage.read_bytes(storage.join(url, MANIFEST)))
    return str(manifest[f"{group}{TENSORS}"]["sha256"])


class CheckpointWriter(Background):
    """Saves snapshots in a background thread, one at a time, off the step path."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__("checkpoint")
        self.store = store
        self.committed: str | None = None  # URL of the newest committed folder
        self._newest: threading.Thread | None = None  # that saves

    def submit(self, snapshot: Snapshot) -> None:
        """Start saving; waits for the save before it, and raises what that one raised."""
        if self._thread is self._newest:  # else averages are on their way: it only follows them
            self.wait()
        self.follow(partial(self._save, snapshot))
        self._newest = self._thread

    def _save(self, snapshot: Snapshot) -> None:
        self.committed = self.store.save(snapshot)


def _verified(url: str, name: str, entry: dict[str, Any]) -> bytes:
    try:
        return verified.read(storage.join(url, name), entry["sha256"])
    except DamagedError:
        raise _damaged(url, name, "its sha256 is not the manifest's") from None


def _damaged(url: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        storage.join(url, name), reason, "the bytes changed since they were saved"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
