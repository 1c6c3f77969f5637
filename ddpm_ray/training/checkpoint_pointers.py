"""Pointers to a run's committed checkpoints: each commit writes one small object, once.

    <url>/pointers/00000007-00000012.json   commit 12 of start 7: folders and manifest hashes,
                                            newest first
    <url>/latest.json                       a copy of the newest, for readers that cannot list
                                            (https)

Each start of a run (writer_lease.py) writes pointers under its own number. A writer that was frozen
and resumes after a later start has taken over therefore cannot change the later commits: readers
use the highest-numbered pointer that verifies. No conditional write is needed. A stale listing
shows an earlier commit, from which a run continues to the same result.

Earlier versions wrote only latest.json and previous.json; their runs can be read and continued.
"""

import hashlib
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import NotAnObjectError, StorageError

log = logging.getLogger(__name__)

POINTERS = "pointers"  # below a run's checkpoints
LATEST, PREVIOUS = "latest.json", "previous.json"  # earlier versions had only these two
PREFIX = "step-"  # of a checkpoint's folder
FOLDER = re.compile(PREFIX + "([0-9]{8,})-(?:([0-9]{8,})-)?[0-9a-f]{8}")  # step, epoch
NAME = re.compile(r"([0-9]{8,})-([0-9]{8,})\.json")


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint that a pointer names, and the sha256 of its manifest."""

    folder: str
    manifest_sha256: str

    @classmethod
    def of(cls, folder: str, manifest: bytes | memoryview) -> "CommittedCheckpoint":
        """Create the reference to `folder`, whose manifest file holds these bytes."""
        return cls(folder, hashlib.sha256(manifest).hexdigest())

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        return folder_step_epoch(self.folder)[0]


def folder_step_epoch(folder: str) -> tuple[int, int]:
    """Return step and epoch (number of the start) from the name of a checkpoint folder.

    The epoch is 0 for names of earlier versions. Raises ValueError for any other name.
    """
    match = FOLDER.fullmatch(folder)
    if match is None:
        raise ValueError(f"{folder} is no checkpoint folder: step-<step>-<start>-<random>")
    return int(match[1]), int(match[2] or 0)


@dataclass(frozen=True)
class Pointer:
    """One commit: the list of committed checkpoints."""

    epoch: int = 0  # lease epoch of the writer
    number: int = 0  # number of the commit within its epoch; 0: earlier version
    references: list[CommittedCheckpoint] = field(default_factory=list)  # newest first

    @classmethod
    def of(cls, value: Any) -> "Pointer":
        """Create a pointer from JSON. Raises TypeError, KeyError or ValueError."""
        if not value["checkpoints"]:  # never written; accepting it would restart the run
            raise ValueError
        references = [CommittedCheckpoint(**entry) for entry in value["checkpoints"]]
        # Old folders are deleted: a name with a path to elsewhere is invalid.
        if not all(FOLDER.fullmatch(reference.folder) for reference in references):
            raise ValueError
        return cls(int(value["epoch"]), int(value.get("number", 0)), references)

    @property
    def name(self) -> str:
        """Object name below `pointers/`."""
        return f"{self.epoch:08d}-{self.number:08d}.json"

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: increases with each commit and each start."""
        return self.epoch, self.number

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        checkpoints = [vars(one) for one in self.references]
        return {"epoch": self.epoch, "number": self.number, "checkpoints": checkpoints}


@dataclass(frozen=True)
class Found:
    """The commits found in a run's folder."""

    pointer: Pointer | None  # the newest that verifies
    names: list[str]  # all objects below `pointers/`, oldest first, including damaged ones
    damaged: list[str]  # URLs of damaged pointers that may be newer than `pointer`

    @property
    def epoch(self) -> int:
        """Highest epoch that committed anything, also if its pointer is damaged."""
        named = [int(name.partition("-")[0]) for name in self.names]
        return max([0, *named, *([self.pointer.epoch] if self.pointer else [])])


def find(url: str, below: int | None = None) -> Found:
    """Find the commits below `url`, of all epochs or of those less than `below`.

    Raises StorageError in an outage; damaged pointers are listed in the result.
    """
    listed = filter(NAME.fullmatch, object_store.file_names(object_store.join(url, POINTERS)))
    names = sorted((name for name in listed if below is None or _rank(name)[0] < below), key=_rank)
    found, damaged = None, []
    for name in reversed(names):
        where = object_store.join(url, POINTERS, name)
        found = _read(where)
        if found is not None and found.name == name:
            break
        if not object_store.exists(where):  # replaced by a newer commit since the listing
            return find(url, below)
        found = None
        damaged.append(where)
    latest = _legacy(url, LATEST, below)
    if isinstance(latest, str):
        damaged += [] if names else [latest]  # with pointers, latest.json is only a copy
    elif latest is not None and (found is None or latest.rank > found.rank):
        found, damaged = (
            latest,
            [d for d in damaged if _rank(object_store.name_of(d)) > latest.rank],
        )
    if found is None and isinstance(before := _legacy(url, PREVIOUS, below), Pointer):
        found, damaged = before, damaged or [object_store.join(url, LATEST)]
    return Found(found, names, damaged)


def commit_pointer(url: str, pointer: Pointer) -> None:
    """Commit `pointer`. Raises StorageError, and then nothing is committed."""
    checksummed_json.write(object_store.join(url, POINTERS, pointer.name), pointer.to_json())
    try:
        checksummed_json.write(object_store.join(url, LATEST), pointer.to_json())
    except StorageError as error:
        log.warning("latest.json was not updated: %s", error)


def _legacy(url: str, name: str, below: int | None) -> Pointer | str | None:
    """Read the pointer `name`; return its URL if it is damaged, None if there is none."""
    where = object_store.join(url, name)
    if not object_store.exists(where):
        return None
    pointer = _read(where)
    if pointer is None:
        return where
    return None if below is not None and pointer.epoch >= below else pointer


def _read(where: str) -> Pointer | None:
    """Read the pointer at `where`; None if it is damaged. Raises StorageError in an outage."""
    try:
        return Pointer.of(checksummed_json.read(where))
    except (
        checksummed_json.ChecksumError,
        NotAnObjectError,
        ValueError,
        TypeError,
        KeyError,
    ):
        return None
    except StorageError:
        if object_store.exists(where):
            raise
        return None


def _rank(name: str) -> tuple[int, int]:
    """Sort key of a pointer's name; (0, 0) for LATEST, PREVIOUS and any other name."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (0, 0)
