"""Which checkpoints of a run are committed: each commit is one small object, written once.

    <url>/pointers/00000007-00000012.json   commit 12 of start 7: folders and manifest hashes,
                                            newest first
    <url>/latest.json                       a copy of the newest, for readers that cannot list
                                            (https)

A start of a run (lease.py) writes pointers under its own number alone. A writer that was frozen,
and wakes up after a later start has taken over, can therefore not move what that one committed:
readers take the pointer with the highest number that verifies. No conditional write is needed. A
listing that lags behind shows an earlier commit, from which a run continues to the same end.

Earlier versions wrote latest.json and previous.json alone; their runs are read and continued.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.object_store import StorageError

log = logging.getLogger(__name__)

POINTERS = "pointers"  # below a run's checkpoints
LATEST, PREVIOUS = "latest.json", "previous.json"  # earlier versions had these two alone
PREFIX = "step-"  # of a checkpoint's folder
FOLDER = re.compile(PREFIX + "([0-9]{8,})-(?:([0-9]{8,})-)?[0-9a-f]{8}")  # step, epoch
NAME = re.compile(r"([0-9]{8,})-([0-9]{8,})\.json")


@dataclass(frozen=True)
class Reference:
    """One committed checkpoint, as a pointer names it."""

    folder: str
    manifest_sha256: str

    @property
    def step(self) -> int:
        """The optimiser steps that its state has taken."""
        return folder_step_epoch(self.folder)[0]


def folder_step_epoch(folder: str) -> tuple[int, int]:
    """The step in a checkpoint folder's name, and the start that wrote it.

    The start is 0 in a name of an earlier version, which has none. Raises ValueError for others.
    """
    match = FOLDER.fullmatch(folder)
    if match is None:
        raise ValueError(f"{folder} is no checkpoint folder: step-<step>-<start>-<random>")
    return int(match[1]), int(match[2] or 0)


@dataclass(frozen=True)
class Pointer:
    """The checkpoints that one commit names."""

    epoch: int = 0  # the lease of who wrote it
    number: int = 0  # of the commit among those of its epoch; 0: of an earlier version
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
        return cls(int(value["epoch"]), int(value.get("number", 0)), references)

    @property
    def name(self) -> str:
        """Of its object, below `pointers/`."""
        return f"{self.epoch:08d}-{self.number:08d}.json"

    @property
    def rank(self) -> tuple[int, int]:
        """Grows from commit to commit, and from start to start."""
        return self.epoch, self.number

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        checkpoints = [vars(one) for one in self.references]
        return {"epoch": self.epoch, "number": self.number, "checkpoints": checkpoints}


@dataclass(frozen=True)
class Found:
    """What is known of a run's commits."""

    pointer: Pointer | None  # the newest that verifies
    names: list[str]  # of all objects below `pointers/`, oldest first, damaged ones too
    damaged: list[str]  # URLs of pointers that may be newer than `pointer` and do not verify

    @property
    def epoch(self) -> int:
        """The highest start that committed anything, also where its pointer is damaged."""
        named = [int(name.partition("-")[0]) for name in self.names]
        return max([0, *named, *([self.pointer.epoch] if self.pointer else [])])


def find(url: str, below: int | None = None) -> Found:
    """The commits below `url`: of all starts, or of those with a number lower than `below`.

    Raises StorageError where the storage is away; what is damaged is named in the result.
    """
    listed = filter(NAME.fullmatch, object_store.file_names(object_store.join(url, POINTERS)))
    names = sorted((name for name in listed if below is None or _rank(name)[0] < below), key=_rank)
    found, damaged = None, []
    for name in reversed(names):
        where = object_store.join(url, POINTERS, name)
        found = _read(where)
        if found is not None and found.name == name:
            break
        if not object_store.exists(where):  # a writer has made a newer one since they were listed
            return find(url, below)
        found = None
        damaged.append(where)
    latest = _legacy(url, LATEST, below)
    if isinstance(latest, str):
        damaged += [] if names else [latest]  # else a damaged copy, which nothing rests on
    elif latest is not None and (found is None or latest.rank > found.rank):
        found, damaged = (
            latest,
            [d for d in damaged if _rank(object_store.name_of(d)) > latest.rank],
        )
    if found is None and isinstance(before := _legacy(url, PREVIOUS, below), Pointer):
        found, damaged = before, damaged or [object_store.join(url, LATEST)]
    return Found(found, names, damaged)


def write(url: str, pointer: Pointer) -> None:
    """Commit what `pointer` names. Raises StorageError, and then nothing is committed."""
    checksummed_json.write(object_store.join(url, POINTERS, pointer.name), pointer.to_json())
    try:
        checksummed_json.write(object_store.join(url, LATEST), pointer.to_json())
    except StorageError as error:
        log.warning("the copy of the newest pointer is not up to date: %s", error)


def _legacy(url: str, name: str, below: int | None) -> Pointer | str | None:
    """The pointer at a fixed name; its URL where it is damaged, None where there is none."""
    where = object_store.join(url, name)
    if not object_store.exists(where):
        return None
    pointer = _read(where)
    if pointer is None:
        return where
    return None if below is not None and pointer.epoch >= below else pointer


def _read(where: str) -> Pointer | None:
    """The pointer at `where`, None where it is damaged; raises StorageError in an outage."""
    try:
        return Pointer.of(checksummed_json.read(where))
    except (
        checksummed_json.ChecksumError,
        object_store.NotAnObjectError,
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
    """Of a pointer's name; (0, 0) for LATEST, PREVIOUS and whatever else lies there."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else (0, 0)
