"""Every file of a source folder, sorted by what it is; what is no image is named, never dropped.

Links are followed, as data sets lie on other disks: each folder is taken once, so a loop ends, and
a folder reached by its own path goes before one reached by a link. Pipes, devices, sockets and
links to nothing are named; nothing of theirs is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_ray.data.packing.image_files import is_image
from ddpm_ray.data.samples import NamedGroup, groups
from ddpm_ray.data.shards import DatasetError
from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_store import ObjectState, StorageError

TAR, TABLES = ".tar", (".parquet", ".arrow")
METADATA = ("metadata.csv", "metadata.jsonl")
SYSTEM = {  # files and folders that operating systems and storage devices leave behind
    "thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin",
    "system volume information",
}  # fmt: skip
OTHER_PICTURES = (
    ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".ico", ".tga",
    ".psd", ".xcf", ".svg", ".eps", ".exr", ".hdr", ".pfm", ".pcx", ".sgi", ".dds", ".dng", ".cr2",
    ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".dcm",
)  # fmt: skip
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}

HIDDEN = "hidden or system files"
ODD = "pipes, devices and links to nothing"
SEEN = "links to folders that are taken already"
UNREADABLE = "images of formats that are not read (convert them to PNG)"
ARCHIVED = "compressed archives (unpack them)"
OTHER = "other files"


@dataclass
class SourceFiles:
    """The files of a source by kind, each with its size and version, ordered by name."""

    images: dict[str, ObjectState] = field(default_factory=dict)
    tars: dict[str, ObjectState] = field(default_factory=dict)
    tables: dict[str, ObjectState] = field(default_factory=dict)
    metadata: dict[str, ObjectState] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)  # at the top; known of a local source only
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def left_out(self) -> tuple[NamedGroup, ...]:
        """What is neither an image, a tar, a table nor their metadata."""
        return groups(self.others.items())

    def add(self, name: str, state: ObjectState) -> None:
        """Put one regular file where it belongs."""
        lower = name.lower()
        if is_image(lower):
            self.images[name] = state
        elif lower.endswith(TAR):
            self.tars[name] = state
        elif lower.endswith(TABLES):
            self.tables[name] = state
        elif lower.rpartition("/")[2] in METADATA:
            self.metadata[name] = state
        else:
            self.others[_kind_of_other(lower)].append(name)


def list_source(url: str) -> SourceFiles:
    """What lies below the folder `url`. Raises StorageError."""
    files = SourceFiles()
    if object_store.is_local(url):
        found = dict(_walk(object_store.local_path(url), files))
    else:
        found = {}
        for name, state in object_store.states(url).items():
            parts = name.split("/")
            hidden = next((n for n, part in enumerate(parts) if is_hidden(part)), None)
            if hidden is None:
                found[name] = state
            else:
                files.others[HIDDEN].append("/".join(parts[: hidden + 1]))
        files.others[HIDDEN] = sorted(set(files.others[HIDDEN]))
    for name in sorted(found):
        files.add(name, found[name])
    return files


def refuse_splits(url: str, kind: str, names: Iterable[str]) -> None:
    """Raise DatasetError where files are of several splits, as `train-000.tar`, `val/0.parquet`."""
    found = {frozenset(SPLITS & set(re.split(r"[/._-]", name.lower()))) for name in names}
    if len(found - {frozenset()}) > 1:
        problem = f"its {kind} are of the splits {', '.join(sorted(frozenset().union(*found)))}"
        raise DatasetError(url, problem, "give one file, or a folder with the files of one split")


def is_hidden(name: str) -> bool:
    """True for the name of a hidden file or folder, or one that a system leaves behind."""
    return name.startswith(".") or name.lower() in SYSTEM


def _kind_of_other(lower: str) -> str:
    if lower.endswith(OTHER_PICTURES):
        return UNREADABLE
    return ARCHIVED if lower.endswith(ARCHIVES) else OTHER


def _walk(root: Path, files: SourceFiles) -> Iterator[tuple[str, ObjectState]]:
    """Every regular file below `root`; what else is there goes to `files`."""
    own, linked = deque([("", root)]), deque[tuple[str, Path]]()
    seen: set[tuple[int, int]] = set()
    while own or linked:
        prefix, folder = (own or linked).popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                files.others[SEEN].append(prefix.rstrip("/"))
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StorageError(str(folder), f"cannot be listed ({reason})", "mend it") from None
        for entry in entries:
            name = prefix + entry.name
            if is_hidden(entry.name):
                files.others[HIDDEN].append(name)
                continue
            try:
                status = entry.stat()  # of what a link leads to
            except OSError:  # to nothing, or to itself
                files.others[ODD].append(name)
                continue
            if stat.S_ISDIR(status.st_mode):
                (linked if entry.is_symlink() else own).append((f"{name}/", folder / entry.name))
                files.folders.update([name] if not prefix else [])
            elif stat.S_ISREG(status.st_mode):
                yield name, ObjectState(status.st_size, str(status.st_mtime_ns))
            else:
                files.others[ODD].append(name)
