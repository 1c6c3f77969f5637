"""List every file of a source folder by kind; files that cannot be packed are listed too.

Symbolic links are followed, as data sets often lie on other disks. Each folder is listed once, so
loops end; a folder's own path is preferred to a link to it. Pipes, devices, sockets and broken
links are listed by name and never opened.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import builtin_datasets
from ddpm_ray.data.packing.image_files import is_image
from ddpm_ray.data.samples import NamedGroup, named_groups
from ddpm_ray.storage import object_state, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.storage.object_state import ObjectState

TAR, TABLES = ".tar", (".parquet", ".arrow")
METADATA = ("metadata.csv", "metadata.jsonl")
CAPTIONS, TEXT = ("captions.tsv", "captions.jsonl"), ".txt"
# Files and folders that operating systems and storage devices create.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin"}
SYSTEM_NAMES |= {"system volume information"}
# Suffixes of image formats that are not supported: of cameras, and of programs.
OTHER_IMAGES: tuple[str, ...] = (
    ".heic",
    ".heif",
    ".hif",
    ".avif",
    ".jp2",
    ".j2k",
    ".jpx",
    ".jxl",
    ".jxr",
)
OTHER_IMAGES += (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".dcm")
OTHER_IMAGES += (".ico", ".tga", ".psd", ".xcf", ".svg", ".eps", ".exr", ".hdr", ".pfm")
OTHER_IMAGES += (".pcx", ".sgi", ".dds")
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}

HIDDEN = "hidden or system files"
SPECIAL = "pipes, devices and broken links"
REPEATED = "links to folders that are listed already"
OTHER_FORMATS = "images of unsupported formats (convert them to PNG)"
COMPRESSED = "compressed archives (unpack them)"
OTHER = "other files"


@dataclass
class SourceFiles:
    """The files of a source by kind, each with its size and version, ordered by name."""

    images: dict[str, ObjectState] = field(default_factory=dict)
    tars: dict[str, ObjectState] = field(default_factory=dict)
    tables: dict[str, ObjectState] = field(default_factory=dict)
    metadata: dict[str, ObjectState] = field(default_factory=dict)
    captions: dict[str, ObjectState] = field(default_factory=dict)
    texts: dict[str, ObjectState] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # of captions and texts; the rest are other files
    folders: set[str] = field(default_factory=set)  # top-level folders; local sources only
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def left_out(self) -> tuple[NamedGroup, ...]:
        """Files that are no image, tar, table or metadata file, and whose captions are not used."""
        unused = [name for name in (*self.captions, *self.texts) if name not in self.used]
        others = {**self.others, OTHER: [*self.others.get(OTHER, []), *unused]}
        return named_groups(others.items())

    def texts_of_images(self) -> dict[str, str]:
        """Return the text file of each image that has one: of the same name but for the suffix."""
        texts = {posixpath.splitext(name)[0]: name for name in self.texts}
        stems = {image: posixpath.splitext(image)[0] for image in self.images}
        return {image: texts[stem] for image, stem in stems.items() if stem in texts}

    def add(self, name: str, state: ObjectState) -> None:
        """Add a regular file to the group of its kind."""
        lower = name.lower()
        if is_image(lower):
            self.images[name] = state
        elif lower.endswith(TAR):
            self.tars[name] = state
        elif lower.endswith(TABLES):
            self.tables[name] = state
        elif lower.rpartition("/")[2] in METADATA:
            self.metadata[name] = state
        elif lower.rpartition("/")[2] in CAPTIONS:
            self.captions[name] = state
        elif lower.endswith(TEXT):
            self.texts[name] = state
        else:
            self.others[_kind_of_other(lower)].append(name)


def list_source(url: str) -> SourceFiles:
    """List all files below the folder `url`. Raises StorageError."""
    files = SourceFiles()
    if object_store.is_local(url):
        found = dict(_walk(object_store.local_path(url), files))
    else:
        found = {}
        for name, state in object_state.states(url).items():
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
    """Raise DatasetError if names mix splits, as in `train-000.tar` and `val/0.parquet`."""
    found = {frozenset(SPLITS & set(re.split(r"[/._-]", name.lower()))) for name in names}
    if len(found - {frozenset()}) > 1:
        problem = f"its {kind} belong to the splits {', '.join(sorted(frozenset().union(*found)))}"
        raise DatasetError(url, problem, "give one file, or a folder with the files of one split")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _kind_of_other(lower: str) -> str:
    if lower.endswith(OTHER_IMAGES):
        return OTHER_FORMATS
    return COMPRESSED if lower.endswith(ARCHIVES) else OTHER


def _walk(root: Path, files: SourceFiles) -> Iterator[tuple[str, ObjectState]]:
    """Yield every regular file below `root`; add all other entries to `files`."""
    own, linked = deque([("", root)]), deque[tuple[str, Path]]()
    seen: set[tuple[int, int]] = set()
    while own or linked:
        prefix, folder = (own or linked).popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                files.others[REPEATED].append(prefix.rstrip("/"))
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StorageError(str(folder), f"cannot be listed ({reason})", "check it") from None
        for entry in entries:
            name = prefix + entry.name
            if is_hidden(entry.name):
                files.others[HIDDEN].append(name)
                continue
            try:
                status = entry.stat()  # follows links
            except OSError:  # a broken link, or one to itself
                files.others[SPECIAL].append(name)
                continue
            if stat.S_ISDIR(status.st_mode):
                (linked if entry.is_symlink() else own).append((f"{name}/", folder / entry.name))
                files.folders.update([name] if not prefix else [])
            elif stat.S_ISREG(status.st_mode):
                yield name, ObjectState(status.st_size, str(status.st_mtime_ns))
            else:
                files.others[SPECIAL].append(name)


def require_source(source: str) -> None:
    """Raise DatasetError unless the `source` on this machine is a folder, tar or table."""
    known = ", ".join(builtin_datasets.NAMES)
    remedy = (
        f"give a folder of images, tars or tables, a .tar, .parquet or .arrow, or one of {known}"
    )
    try:
        mode = object_store.local_path(source).stat().st_mode
    except OSError as error:
        problem = "there is no such file or folder"
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            problem = f"it cannot be read ({error.strerror})"
        raise DatasetError(source, problem, remedy) from None
    lower = source.lower()
    if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and lower.endswith((TAR, *TABLES))):
        return
    if not stat.S_ISREG(mode):
        problem = "it is a pipe or a device"
    elif lower.endswith(ARCHIVES):
        problem, remedy = "it is compressed", "unpack it first (a .tar.gz: gunzip it)"
    elif is_image(source):
        problem = "it is a single image"
    else:
        problem = "it is a file of an unknown type"
    raise DatasetError(source, problem, remedy)
