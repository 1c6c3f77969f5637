"""What can be packed: a built-in set, a folder of images, WebDataset tars. All in a fixed order.

A source is small or shared, goes to Ray tasks whole, and gives any range of its samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from ddpm_ray.data import built_in_sets, storage
from ddpm_ray.data.built_in_sets import BuiltIn, Split
from ddpm_ray.data.image_files import is_image
from ddpm_ray.data.shards import DatasetError

READERS = 16  # small remote files at a time: each is mostly waiting
MOST_CLASSES = 2**20  # one stray label of 10^12 would ask for as many names
MOST_LABEL_BYTES = 2**20


class Sample(NamedTuple):
    """One image of a source."""

    key: str
    label: int  # -1: none
    image: npt.NDArray[np.uint8] | bytes | None  # [H, W, C]; a file; one too large to be read
    place: str  # for messages


class Source(Protocol):
    """Samples in an order that depends on nothing but the source."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def digest(self) -> str:
        """Names the samples: changes if a key, a label, a file's size or a pixel array does."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: range) -> Iterator[Sample]: ...


def open_source(
    source: str,
    split: Split = "train",
    url: str = "",
    sha256: Sequence[str] = (),
    max_file_bytes: int = 256 << 20,
) -> Source:
    """The source of that name, folder or tar; `split`, `url`, `sha256` are for built-in names.

    An image file of more than `max_file_bytes` is named, but not read.
    Raises DatasetError where there is nothing to pack, StorageError where it cannot be read.
    """
    if source in built_in_sets.NAMES:
        arrays = built_in_sets.load(cast(BuiltIn, source), split, url, sha256)
        return ArraySource(source, *arrays)
    source = storage.absolute(source, Path.cwd())  # tasks run in folders of their own
    if source.endswith(".tar"):
        folder, _, file = source.rpartition("/")
        return _tar_source(folder or ".", [file], max_file_bytes)
    if "://" not in source and not storage.exists(source):
        known = ", ".join(built_in_sets.NAMES)
        remedy = f"give a folder of images or tars, a .tar, or one of {known}"
        raise DatasetError(source, "there is no such source", remedy)
    sizes = storage.list_files(source)
    if tars := [name for name in sizes if name.endswith(".tar")]:
        return _tar_source(source, tars, max_file_bytes)
    images = {name: sizes[name] for name in sizes if is_image(name)}
    return _folder_source(source, images, max_file_bytes)


@dataclass(frozen=True)
class ArraySource:
    """A set that is in memory."""

    name: str
    images: npt.NDArray[np.uint8]  # [N, H, W, C]
    labels: npt.NDArray[np.int64]  # [N]
    label_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of name, pixels and labels."""
        digest = hashlib.sha256(repr((self.name, self.images.shape, self.label_names)).encode())
        digest.update(self.images.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, samples: range) -> Iterator[Sample]:
        for n in samples:
            key = f"{self.name}-{n:06d}"
            yield Sample(key, int(self.labels[n]), self.images[n], key)


class Member(NamedTuple):
    """A sample of a folder or tar."""

    file: str
    key: str
    label: int
    offset: int  # in the file; -1: the file is the image
    size: int  # in bytes


@dataclass(frozen=True)
class FileSource:
    """Images as files of their own, or as parts of tars."""

    url: str
    members: tuple[Member, ...]
    label_names: tuple[str, ...]
    max_file_bytes: int

    @property
    def digest(self) -> str:
        text = json.dumps([self.label_names, self.members])
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.members)

    def read(self, samples: range) -> Iterator[Sample]:
        """These samples in order, files fetched a run ahead."""
        members = self.members[samples.start : samples.stop]
        with ThreadPoolExecutor(1 if storage.is_local(self.url) else READERS) as pool:
            # In runs, so that no more than a run of files is in memory ahead of the reader.
            for at in range(0, len(members), 4 * READERS):
                run = members[at : at + 4 * READERS]
                for member, data in zip(run, pool.map(self._bytes, run), strict=True):
                    place = storage.join(self.url, member.file)
                    if member.offset >= 0:
                        place = f"{place}: {member.key}"
                    yield Sample(member.key, member.label, data, place)

    def _bytes(self, member: Member) -> bytes | None:
        if member.size > self.max_file_bytes:
            return None
        url = storage.join(self.url, member.file)
        if member.offset < 0:
            return storage.read_bytes(url)
        return _tar_bytes(url)[member.offset : member.offset + member.size]


@lru_cache(maxsize=1)  # neighbours in the order lie in the same tar
def _tar_bytes(url: str) -> bytes:
    return storage.read_bytes(url)


def _folder_source(url: str, sizes: dict[str, int], max_file_bytes: int) -> FileSource:
    """A flat folder has no labels; with a class per sub-folder, label 0 is the first by name."""
    if not sizes:
        raise DatasetError(url, "there is no image in it", "give a folder of images or .tar files")
    tops = {name.split("/")[0] for name in sizes if "/" in name}
    flat = [name for name in sizes if "/" not in name]
    if tops and flat:
        problem = f"it has images of its own ({flat[0]}) beside sub-folders ({min(tops)})"
        remedy = "put each image into the sub-folder of its class, or all into one folder"
        raise DatasetError(url, problem, remedy)
    label_names = tuple(sorted(tops))
    label = {name: n for n, name in enumerate(label_names)}
    members = [
        Member(n, _text(n), label.get(n.split("/")[0], -1), -1, sizes[n]) for n in sorted(sizes)
    ]
    return FileSource(url, tuple(members), label_names, max_file_bytes)


def _tar_source(folder: str, tars: list[str], max_file_bytes: int) -> FileSource:
    """Samples of WebDataset tars: files that share a name up to the first dot of their last part.

    The image is the first file with an image's suffix; the label is the integer in `.cls`, or in
    `.json` under "label" or "cls".
    """
    members: list[Member] = []
    for tar in sorted(tars):
        members += sorted(_tar_members(folder, tar), key=lambda member: member.key)
    if not members:
        raise DatasetError(folder, "there is no image in its tars", "give tars with image files")
    if len({member.label < 0 for member in members}) > 1:
        bare = next(member.key for member in members if member.label < 0)
        remedy = "give every sample a .cls or none"
        raise DatasetError(folder, f"some samples have a label and {bare} has none", remedy)
    classes = 1 + max(member.label for member in members)
    names = tuple(str(n) for n in range(classes))
    return FileSource(folder, tuple(members), names, max_file_bytes)


def _tar_members(folder: str, file: str) -> Iterator[Member]:
    url = storage.join(folder, file)
    data = _tar_bytes(url)
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        # "r:" opens no compressed one, whose offsets and sizes would be those of something else.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for info in archive:
                parent, _, last = info.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                key = _text(f"{parent}/{stem}".lstrip("/"))
                if not info.isfile() or info.issparse() or not stem:  # a sparse one claims any size
                    continue
                if suffix in ("cls", "json"):
                    size = min(info.size, MOST_LABEL_BYTES)
                    label = _label(data[info.offset_data : info.offset_data + size], suffix)
                    labels.update({} if label is None else {key: label})
                elif is_image("." + suffix):
                    images.setdefault(key, (info.offset_data, info.size))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DatasetError(url, f"not a readable tar ({error})", "write it again") from error
    for key, (offset, size) in images.items():
        yield Member(file, key, labels.get(key, -1), offset, size)


def _label(content: bytes, suffix: str) -> int | None:
    """The label in a .cls or .json file, or None; ValueError where it is not a count from 0."""
    if suffix == "cls":
        label = int(content)
    else:
        found = json.loads(content)
        value = found.get("label", found.get("cls")) if isinstance(found, dict) else None
        if not isinstance(value, int):
            return None
        label = value
    if label < 0:
        raise ValueError(f"label {label} is negative")
    if label >= MOST_CLASSES:
        raise ValueError(f"label {label} is not below {MOST_CLASSES}")
    return label


def _text(name: str) -> str:
    """A name as it can be stored: bytes of it that are no UTF-8 are spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
