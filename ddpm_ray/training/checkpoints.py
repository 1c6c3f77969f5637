"""Crash-safe checkpoints: data files are written first, then the manifest, then the pointer.

    <url>/pointers/                         committed checkpoints, see checkpoint_pointers.py
    <url>/step-00000500-00000007-3f2a91c4/  one attempt of start 7: a folder is never written twice
        model.safetensors ema.safetensors optimizer.safetensors state.json
        manifest.json                       format, sizes and sha256 of the four, written after them

Readers follow the newest pointer, verify every byte and fall back to the previous checkpoint. If
pointers are lost or damaged, complete folders count as checkpoints: a run never restarts from step
0 next to a valid checkpoint, and a folder with a manifest is deleted only after newer ones have
replaced it. No file is a pickle. writer_lease.py decides who may commit.
"""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray import fault_injection
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.errors import NotAnObjectError, StorageError
from ddpm_ray.storage.file_formats import FORMAT, require_readable
from ddpm_ray.training import checkpoint_pointers
from ddpm_ray.training.checkpoint_pointers import (
    FOLDER,
    POINTERS,
    PREFIX,
    Found,
    Pointer,
    Reference,
)
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease, SupersededError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # below a run's folder
MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("model", "ema", "optimizer")  # of tensors that each checkpoint has
NEWEST_FORMAT = 1  # of a checkpoint's folder
TENSORS = ".safetensors"
TENSOR_FILE = re.compile(r"([a-z][a-z0-9.-]*)\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or missing; args are (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


class CheckpointStore:
    """The checkpoints below `url` of one run; one writer at a time, any number of readers.

    A writer holds a lease; without one (tests, tools) writes are not fenced.
    """

    def __init__(self, url: str, keep: int = 3, planned_every: int = 0) -> None:
        self.url, self.keep = url, keep  # the newest steps that are kept
        self.planned_every = planned_every  # steps; the newest multiple of it is kept as well
        self.lease: Lease | None = None
        self._own: Pointer | None = None  # before this writer's next commit; see acquire_lease
        self._written: list[str] = []  # names of pointers that this writer may delete, oldest first
        self._taken_over: list[Reference] = []  # which no pointer named; see acquire_lease
        self._verified: Reference | None = None  # the newest that was read back whole

    def acquire_lease(self, lease: Lease) -> None:
        """Commit under this lease from now on. Raises StorageError.

        Complete checkpoints without a pointer (the writer died, or pointers were lost) are taken
        over and committed; incomplete checkpoints of superseded writers are deleted.
        """
        self.lease = lease
        found = checkpoint_pointers.find(self.url, below=lease.epoch)
        named = found.pointer.references if found.pointer else []
        unnamed, unfinished = self._unnamed(named, below=lease.epoch)
        known = _by_step([*named, *unnamed])
        self._own, self._written = Pointer(lease.epoch, 0, known), found.names
        self._taken_over = unnamed
        if found.damaged or (known and not named):
            self._log_recovery(found, known)
        else:
            for folder in unfinished:  # of earlier starts, which can commit no more
                self._delete(folder)
        if known != named:
            self._commit(known)

    def check_lease(self) -> None:
        """Raise SupersededError if a later start has taken over the run. Raises StorageError."""
        if self.lease is not None:
            self.lease.check()

    def save(self, snapshot: Snapshot) -> str:
        """Save a checkpoint; return its folder's URL. Raises StorageError without committing."""
        files = objects(snapshot)
        # A writer with a lease knows its commits: the storage might hold a later writer's.
        newest = self._own or self.pointer()
        folder = f"{PREFIX}{snapshot.step:08d}-{newest.epoch:08d}-{secrets.token_hex(4)}"
        where, before = object_store.join(self.url, folder), newest.references
        known = [Reference(folder, _sha256(files[MANIFEST])), *before]
        kept = self._kept(known)
        try:
            for name, data in files.items():
                fault_injection.at("manifest" if name == MANIFEST else "object")
                object_store.write_bytes(object_store.join(where, name), data)
        except StorageError:
            if not self._superseded():  # a later start may have taken it over by its manifest
                self._delete(folder)  # an incomplete folder only fills the disk
            raise
        fault_injection.at("commit")
        self.check_lease()
        self._commit(kept)
        fault_injection.at("retire")
        retired = [old for old in before if old not in kept]
        # Checked after the commit: any later start then reads a pointer without these folders.
        if retired and not self._superseded():
            for old in retired:
                self._delete(old.folder)
        return where

    def load(self, groups: Sequence[str] | None = None) -> tuple[str, Snapshot] | None:
        """Load the newest valid checkpoint; return its folder's URL and it, or None if none exists.

        `groups`: tensor groups to read (None: all); missing ones are left out. Damaged checkpoints
        are skipped with a warning. Raises CheckpointError if all are damaged, because the run must
        not restart from step 0 silently, and StorageError in an outage. A writer with a lease saves
        a checkpoint that it took over again, which may raise SupersededError.
        """
        references = self._own.references if self._own else self._known()
        reasons = []
        for place, reference in enumerate(references, 1):
            where = object_store.join(self.url, reference.folder)
            try:
                found = where, read(where, reference.manifest_sha256, groups)
                if groups is not None:
                    return found
                self._verified = reference
                # Its writer may only be frozen, on the point of deleting it: from here on the run
                # rests on a copy, which that one does not know.
                taken_over = reference in self._taken_over
                return (self.save(found[1]), found[1]) if taken_over else found
            except (CheckpointError, StorageError) as error:
                if isinstance(error, StorageError) and self._is_away(error, reference):
                    raise  # the storage is away, not the checkpoint: that passes, try again
                way = "trying the" if place < len(references) else "there is no"
                log.warning("%s; %s checkpoint before it", error, way)
                reasons.append(str(error))
        if references:
            remedy = "restore one of them from a backup, or start a run under another name"
            raise CheckpointError(self.url, f"no checkpoint verifies ({reasons[0]})", remedy)
        return None

    def at(self, step: int) -> str | None:
        """Return the URL of the committed checkpoint of `step`, or None if it was not kept."""
        references = (self._own or self.pointer()).references
        found = next((one.folder for one in references if one.step == step), None)
        return None if found is None else object_store.join(self.url, found)

    def pointer(self) -> Pointer:
        """Return the committed checkpoints; if the newest pointers are damaged, an older commit.

        Its epoch is the highest of all commits and checkpoints, so that a start with a higher epoch
        finds each of them. Warns about damage. Raises CheckpointError if neither a valid pointer
        nor a complete checkpoint is left, and StorageError.
        """
        found = checkpoint_pointers.find(self.url)
        known = self._known(found)
        epochs = [checkpoint_pointers.folder_step_epoch(one.folder)[1] for one in known]
        return Pointer(max([found.epoch, *epochs]), 0, known)

    def _known(self, found: Found | None = None) -> list[Reference]:
        """Checkpoints that a reader may use, newest first."""
        found = found or checkpoint_pointers.find(self.url)
        named = found.pointer.references if found.pointer else []
        if named and not found.damaged:
            return named
        known = _by_step([*named, *self._unnamed(named)[0]])
        if found.damaged or known:
            self._log_recovery(found, known)
        return known

    def _unnamed(
        self, named: Sequence[Reference], below: int | None = None
    ) -> tuple[list[Reference], list[str]]:
        """Find complete checkpoints that are not among `named`, and incomplete folders.

        Of all epochs, or of those less than `below`: a folder that a later start is writing must be
        neither taken over nor deleted.
        """
        known = {one.folder for one in named}
        whole, unfinished = [], []
        for folder in object_store.folders(self.url):
            if not FOLDER.fullmatch(folder) or folder in known:
                continue
            if below is not None and checkpoint_pointers.folder_step_epoch(folder)[1] >= below:
                continue
            manifest = _manifest(object_store.join(self.url, folder))
            if manifest is None:
                unfinished.append(folder)
            else:
                whole.append(Reference(folder, _sha256(manifest)))
        return whole, unfinished

    def _kept(self, known: Sequence[Reference]) -> list[Reference]:
        """Select the checkpoints to keep from `known`, newest first.

        Keeps the newest of each of the last `keep` steps, the newest scheduled one (for rewinding),
        and the one that this start was read from.
        """
        # The latter, however old, is the only one known to be readable: later ones were never read
        # back and may all be damaged. It is kept until a later start has read a newer one.
        newest = {one.step: one for one in reversed(known)}
        of_steps = [one for one in known if newest[one.step] is one]
        every = self.planned_every
        planned = [one for one in of_steps if every and one.step % every == 0]
        wanted = [*of_steps[: self.keep], *planned[:1], self._verified]
        return [one for one in known if one in wanted]

    def _log_recovery(self, found: Found, known: Sequence[Reference]) -> None:
        """Log what is taken in place of lost pointers; raises CheckpointError where it is nothing.

        Nothing is deleted then: what is damaged may be all that a person has to mend it by.
        """
        if not known:
            remedy = "restore it from a backup; it lists the checkpoint folders beside it"
            raise CheckpointError(found.damaged[0], "is not a list of checkpoints", remedy)
        reason = f"{found.damaged[0]} is damaged" if found.damaged else "no pointer is there"
        newest = object_store.join(self.url, known[0].folder)
        count = counted(len(known), "checkpoint")
        log.warning("%s; recovered %s, the newest %s", sanitize(reason), count, newest)

    def _commit(self, references: list[Reference]) -> None:
        """Write the next pointer and delete old ones; keeps the previous as fallback."""
        if self._own is None:
            found = checkpoint_pointers.find(self.url)
            number = found.pointer.number if found.pointer else 0
            before, names = Pointer(found.epoch, number), found.names
        else:
            before, names = self._own, self._written
        pointer = Pointer(before.epoch, before.number + 1, references)
        checkpoint_pointers.write(self.url, pointer)
        if self._own is not None:
            self._own = pointer
        self._written = [*names[-1:], pointer.name]
        try:
            for name in names[:-1]:
                object_store.delete(object_store.join(self.url, POINTERS, name))
        except StorageError as error:
            log.warning("old pointer stays: %s", error)

    def _superseded(self) -> bool:
        """Whether a later start has taken over the run; also True in a storage outage."""
        try:
            self.check_lease()
        except (SupersededError, StorageError):
            return True
        return False

    def _is_away(self, error: StorageError, reference: Reference) -> bool:
        """Whether the storage failed, and not the checkpoint."""
        where, names = object_store.join(self.url, reference.folder), (MANIFEST, *file_names())
        return not isinstance(error, NotAnObjectError) and all(
            object_store.exists(object_store.join(where, name)) for name in names
        )

    def _delete(self, folder: str) -> None:
        """Delete a folder, best effort: a folder that remains only takes space."""
        try:
            object_store.delete_folder(object_store.join(self.url, folder))
        except StorageError as error:
            log.warning("old checkpoint stays: %s", error)


def _by_step(references: Sequence[Reference]) -> list[Reference]:
    """Sort by step, newest first; keeps the order within a step."""
    return sorted(references, key=lambda one: -one.step)


def _manifest(where: str) -> bytes | None:
    """Read the manifest of the folder `where`; None if the save did not complete."""
    place = object_store.join(where, MANIFEST)
    try:
        data = object_store.read_bytes(place) if object_store.exists(place) else b""
        return data if isinstance(json.loads(data), dict) else None
    except (ValueError, RecursionError, NotAnObjectError):
        return None


def read(
    url: str, manifest_sha256: str | None = None, groups: Sequence[str] | None = None
) -> Snapshot:
    """Read and verify the checkpoint in the folder `url`.

    Without `manifest_sha256` (a folder given by the user) the manifest itself is not verified.
    `groups`: tensor groups to read, of those it has (None: all); sampling needs `("ema",)`, and
    `()` reads only the JSON. Raises CheckpointError, StorageError, and NewerFormatError, for which
    readers must not fall back to an older checkpoint: the newest steps would be lost.
    """
    try:
        where = object_store.join(url, MANIFEST)
        manifest = (
            checksummed.read(where, manifest_sha256)
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
        files = {name: _verified(url, name, expected[name]) for name in file_names(groups)}
        tensors = {group: safetensors.load(files[f"{group}{TENSORS}"]) for group in groups}
        return Snapshot(tensors, json.loads(files[STATE]))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise _damaged(url, MANIFEST, f"cannot be understood ({error!r})") from error


def objects(snapshot: Snapshot) -> dict[str, bytes]:
    """Return the files of a checkpoint folder by name, in writing order: the manifest is last."""
    files = {
        f"{group}{TENSORS}": safetensors.save(tensors)
        for group, tensors in snapshot.tensors.items()
    }
    files[STATE] = _json(snapshot.facts)
    return files | {MANIFEST: _json({FORMAT: NEWEST_FORMAT} | described(files))}


def described(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return the manifest entry of each file: size in bytes and sha256."""
    return {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}


def file_names(groups: Sequence[str] = GROUPS) -> list[str]:
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


def _verified(url: str, name: str, entry: dict[str, Any]) -> bytes:
    try:
        return checksummed.read(object_store.join(url, name), entry["sha256"], int(entry["bytes"]))
    except DamagedError:
        raise _damaged(url, name, "its sha256 is not the manifest's") from None


def _damaged(url: str, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        object_store.join(url, name), reason, "the bytes changed since they were saved"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
