"""Crash-safe checkpoints: data files are written first, then the manifest, then the pointer.

    <url>/pointers/                         committed checkpoints, see checkpoint_pointers.py
    <url>/step-00000500-00000007-3f2a91c4/  one attempt of start 7: a folder is never written twice
        model.safetensors ema.safetensors optimizer.safetensors state.json
        manifest.json                       format, sizes and sha256 of these, written after them

Readers follow the newest pointer, verify every byte and fall back to the previous checkpoint. If
pointers are lost or damaged, complete folders count as checkpoints: a run never restarts from step
0 next to a valid checkpoint, and a folder with a manifest is deleted only after newer ones have
replaced it. No file is a pickle. writer_lease.py decides who may commit. Large states have more
files, which all workers write: see checkpoint_parts.py and shared_writing.py.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from functools import partial

from ddpm_ray import fault_injection
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import NotAnObjectError, StorageError
from ddpm_ray.training import checkpoint_folder, checkpoint_pointers
from ddpm_ray.training.checkpoint_folder import (
    CheckpointError,
    Entries,
    listed_files,
    read_manifest,
)
from ddpm_ray.training.checkpoint_pointers import (
    FOLDER,
    POINTERS,
    PREFIX,
    CommittedCheckpoint,
    Found,
    Pointer,
)
from ddpm_ray.training.shared_writing import SharedSave
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease, SupersededError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # below a run's folder
Read = Callable[[str, str | None, Sequence[str] | None], Snapshot]  # as read_checkpoint


class CheckpointStore:
    """The checkpoints below `url` of one run; one writer at a time, any number of readers.

    A writer holds a lease; without one (tests, tools) writes are not fenced.
    """

    def __init__(
        self, url: str, keep: int = 3, planned_every: int = 0, milestone_every: int = 0
    ) -> None:
        self.url, self.keep = url, keep  # the newest steps that are kept
        self.planned_every = planned_every  # steps; the newest multiple of it is kept as well
        self.milestone_every = milestone_every  # steps; all multiples of it are kept, for ever
        self.lease: Lease | None = None
        self._own: Pointer | None = None  # before this writer's next commit; see acquire_lease
        self._written: list[str] = []  # names of pointers that this writer may delete, oldest first
        # Complete folders that no pointer named; see acquire_lease.
        self._taken_over: list[CommittedCheckpoint] = []
        self._verified: CommittedCheckpoint | None = None  # the newest that was read back whole

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

    def save(self, snapshot: Snapshot, shared: SharedSave | None = None) -> str:
        """Save a checkpoint; return its folder's URL. Raises StorageError without committing.

        If it is `shared`, `snapshot` has the files of the main worker, which waits for the others.
        """
        # A writer with a lease knows its commits: the storage might hold a later writer's.
        newest = self._own or self.pointer()
        folder = f"{PREFIX}{snapshot.step:08d}-{newest.epoch:08d}-{secrets.token_hex(4)}"
        others: Callable[[], Entries] = dict
        if shared is not None:
            folder, others = shared.folder, partial(shared.wait, self.url, self.check_lease)
        where, before = object_store.join(self.url, folder), newest.references
        try:
            manifest = checkpoint_folder.write_checkpoint(where, snapshot, others)
        except StorageError:
            if not self._superseded():  # a later start may have taken it over by its manifest
                self._delete(folder)  # an incomplete folder only fills the disk
            raise
        kept = self._kept([CommittedCheckpoint.of(folder, manifest), *before])
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

    def load(
        self, groups: Sequence[str] | None = None, read: Read = checkpoint_folder.read_checkpoint
    ) -> tuple[str, Snapshot] | None:
        """Load the newest valid checkpoint; return its folder's URL and it, or None if none exists.

        `groups`: tensor groups to `read` (None: all); missing ones are left out. Damaged ones
        are skipped with a warning. Raises CheckpointError if all are damaged, as the run must
        not restart from step 0 silently, and StorageError in an outage. A writer with a lease saves
        a checkpoint that it took over again, which may raise SupersededError.
        """
        references = self._own.references if self._own else self._known()
        reasons = []
        for place, reference in enumerate(references, 1):
            where = object_store.join(self.url, reference.folder)
            try:
                manifest = reference.manifest_sha256
                found = where, read(where, manifest, groups)
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

    def _known(self, found: Found | None = None) -> list[CommittedCheckpoint]:
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
        self, named: Sequence[CommittedCheckpoint], below: int | None = None
    ) -> tuple[list[CommittedCheckpoint], list[str]]:
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
            manifest = read_manifest(object_store.join(self.url, folder))
            if manifest is None:
                unfinished.append(folder)
            else:
                whole.append(CommittedCheckpoint.of(folder, manifest))
        return whole, unfinished

    def _kept(self, known: Sequence[CommittedCheckpoint]) -> list[CommittedCheckpoint]:
        """Select the checkpoints to keep from `known`, newest first.

        Keeps the newest of each of the last `keep` steps, milestones, the newest scheduled one (for
        rewinding), and the one that this start was read from.
        """
        # The latter, however old, is the only one known to be readable: later ones were never read
        # back and may all be damaged. It is kept until a later start has read a newer one.
        newest = {one.step: one for one in reversed(known)}
        of_steps = [one for one in known if newest[one.step] is one]
        planned = [one for one in of_steps if _is_multiple(one.step, self.planned_every)]
        milestones = [one for one in of_steps if _is_multiple(one.step, self.milestone_every)]
        wanted = [*of_steps[: self.keep], *milestones, *planned[:1], self._verified]
        return [one for one in known if one in wanted]

    def _log_recovery(self, found: Found, known: Sequence[CommittedCheckpoint]) -> None:
        """Log what is taken in place of lost pointers; raises CheckpointError where it is nothing.

        Nothing is deleted then: what is damaged may be all that a person has to mend it by.
        """
        if not known:
            remedy = "restore it from a backup; it lists the checkpoint folders next to it"
            raise CheckpointError(found.damaged[0], "is not a list of checkpoints", remedy)
        reason = f"{found.damaged[0]} is damaged" if found.damaged else "no pointer is there"
        newest = object_store.join(self.url, known[0].folder)
        count = counted(len(known), "checkpoint")
        log.warning("%s; recovered %s, the newest %s", sanitize(reason), count, newest)

    def _commit(self, references: list[CommittedCheckpoint]) -> None:
        """Write the next pointer and delete old ones; keeps the previous as fallback."""
        if self._own is None:
            found = checkpoint_pointers.find(self.url)
            number = found.pointer.number if found.pointer else 0
            before, names = Pointer(found.epoch, number), found.names
        else:
            before, names = self._own, self._written
        pointer = Pointer(before.epoch, before.number + 1, references)
        checkpoint_pointers.commit_pointer(self.url, pointer)
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

    def _is_away(self, error: StorageError, reference: CommittedCheckpoint) -> bool:
        """Whether the storage failed, and not the checkpoint."""
        where = object_store.join(self.url, reference.folder)
        if isinstance(error, NotAnObjectError) or read_manifest(where) is None:
            return False
        try:
            files = listed_files(where)
        except CheckpointError:
            return False
        return all(object_store.exists(object_store.join(where, file.name)) for file in files)

    def _delete(self, folder: str) -> None:
        """Delete a folder, best effort: a folder that remains only takes space."""
        try:
            object_store.delete_folder(object_store.join(self.url, folder))
        except StorageError as error:
            log.warning("old checkpoint stays: %s", error)


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _by_step(references: Sequence[CommittedCheckpoint]) -> list[CommittedCheckpoint]:
    """Sort by step, newest first; keeps the order within a step."""
    return sorted(references, key=lambda one: -one.step)
