"""Open a source: a built-in set, a folder of images, WebDataset tars, Parquet or Arrow files.

Its samples have a fixed order. A source is small enough to send to every Ray task, and each task
reads any range of its samples. Contents that are not packed are listed in `left_out`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import INDEX, MANIFEST, DatasetError
from ddpm_ray.data.packing import builtin_datasets, caption_collector
from ddpm_ray.data.packing.builtin_datasets import BuiltIn
from ddpm_ray.data.packing.folder_source import folder_source
from ddpm_ray.data.packing.source_files import (
    OTHER,
    TABLES,
    TAR,
    SourceFiles,
    list_source,
    refuse_splits,
    require_source,
)
from ddpm_ray.data.packing.table_source import table_source
from ddpm_ray.data.packing.tar_source import tar_source
from ddpm_ray.data.samples import NamedGroup, Sample, Source
from ddpm_ray.storage import object_state, object_store


def open_source(source: str, options: PackConfig | None = None) -> Source:
    """Open a built-in set by name, or a folder, tar or table by path or URL.

    An image file of more than `options.max_file_bytes` is listed but not read. Raises DatasetError
    if there is nothing to pack, StorageError if the source cannot be read.
    """
    options = options or PackConfig()
    if source in builtin_datasets.NAMES:
        return _built_in(source, options)
    source = object_store.absolute(source, Path.cwd())  # tasks run in folders of their own
    if object_store.is_local(source):
        require_source(source)
    files = SourceFiles()
    if source.lower().endswith((TAR, *TABLES)) and not _is_folder(source):
        folder, _, file = source.rpartition("/")
        source = folder or "/"
        files.add(file, object_state.state(object_store.join(source, file)))
    else:
        files = list_source(source)
    if INDEX in files.tables and MANIFEST in files.others[OTHER]:
        remedy = "train on it with data.url, or give the source it was packed from"
        raise DatasetError(source, "it is already a packed data set", remedy)
    kinds = {"images": files.images, "tars": files.tars, "tables": files.tables}
    held = [f"{kind} ({next(iter(found))})" for kind, found in kinds.items() if found]
    if len(held) > 1:
        problem = f"it holds {' and '.join(held)}, and only one kind can be packed"
        raise DatasetError(source, problem, "give the .tar or table itself, or move it elsewhere")
    for kind in ("tars", "tables"):
        refuse_splits(source, kind, kinds[kind])
    return _source_of(source, files, options)


def _source_of(source: str, files: SourceFiles, options: PackConfig) -> Source:
    """Return the source with these files, which are of one kind. Raises DatasetError."""
    if files.tars or files.tables:
        _refuse_caption_file(source, options)
    if files.tars:
        return tar_source(source, files.tars, options, files.left_out)
    if files.tables:
        return table_source(source, files.tables, options, files.left_out)
    if not files.images:
        others = f" (it holds {'; '.join(map(str, files.left_out))})" if files.left_out else ""
        remedy = "give a folder of images or .tar files"
        raise DatasetError(source, f"it has no image{others}", remedy)
    return folder_source(source, files, options)


@dataclass(frozen=True)
class ArraySource:
    """A data set in memory."""

    name: str
    images: npt.NDArray[np.uint8]  # [N, H, W, C]
    labels: npt.NDArray[np.int64]  # [N]
    label_names: tuple[str, ...]
    captions: None = None
    left_out: tuple[NamedGroup, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the name, pixels and labels."""
        digest = hashlib.sha256(repr((self.name, self.images.shape, self.label_names)).encode())
        digest.update(self.images.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    @property
    def version(self) -> str:
        """The digest: arrays in memory have no modification time."""
        return self.digest

    def __len__(self) -> int:
        return len(self.images)

    def read(self, samples: range) -> Iterator[Sample]:
        """Yield the samples of these positions, in order."""
        for n in samples:
            key = f"{self.name}-{n:06d}"
            yield Sample(key, int(self.labels[n]), self.images[n], key)


def _built_in(source: str, options: PackConfig) -> ArraySource:
    """Return a built-in data set."""
    _refuse_caption_file(source, options)
    name = cast(BuiltIn, source)
    arrays = builtin_datasets.load_arrays(name, options.split, options.url, options.file_hashes)
    return ArraySource(source, *arrays)


def _refuse_caption_file(source: str, options: PackConfig) -> None:
    """Raise DatasetError if the option `captions` names a file, which only folders can have."""
    if options.captions not in ("", caption_collector.NONE):
        problem = f"captions is {options.captions!r}, but its images have no file names"
        raise DatasetError(source, problem, "leave captions empty; it is for folders of images")


def _is_folder(source: str) -> bool:
    return object_store.is_local(source) and object_store.local_path(source).is_dir()
