"""Source for images in a column of Parquet or Arrow files, the format of Hugging Face Datasets.

The column holds encoded image files: binary, or a struct of `bytes` and `path`. A label column may
hold numbers, names, or numbers whose names are in the schema (ClassLabel). Other columns are listed
as not packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.captions import caption_tuples, captions_digest
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import class_names, table_files
from ddpm_ray.data.packing.caption_collector import (
    CaptionCollector,
    caption_key_of,
    require_caption_key,
)
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.data.packing.file_source import version_of
from ddpm_ray.data.packing.table_files import TableFile
from ddpm_ray.data.samples import NamedGroup, Sample, named_groups, printable_name
from ddpm_ray.redaction import counted
from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_state import ObjectState

IMAGES, LABEL = ("image", "img", "jpg", "jpeg", "png", "webp"), "label"
COLUMNS = "columns of tables not supported in shards"


@dataclass(frozen=True)
class TableSource:
    """The rows of tables, ordered by file and row."""

    url: str
    files: tuple[TableFile, ...]
    column: str
    labels: npt.NDArray[np.int64]  # [rows of all files]
    label_names: tuple[str, ...]
    max_file_bytes: int
    left_out: tuple[NamedGroup, ...]
    version: str
    captions: pa.LargeListArray | None = None  # of each row

    @property
    def digest(self) -> str:
        """sha256 of the files' names, sizes and row counts, the column, all labels and captions."""
        files = [[file.name, file.size, file.rows] for file in self.files]
        digest = hashlib.sha256(json.dumps([self.label_names, self.column, files]).encode())
        digest.update(self.labels.tobytes())
        if self.captions is not None:
            digest.update(captions_digest(self.captions))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, samples: range) -> Iterator[Sample]:
        """Yield the samples in order, reading each file from the nearest row group on."""
        start = 0
        captions: Iterator[tuple[str, ...]] = repeat(())
        if self.captions is not None:
            captions = iter(caption_tuples(self.captions[samples.start : samples.stop]))
        for file in self.files:
            rows = range(max(samples.start - start, 0), min(samples.stop - start, file.rows))
            if rows:
                url = object_store.join(self.url, file.name)
                images = table_files.read_image_files(url, file, self.column, rows)
                for row, image in zip(rows, images, strict=True):
                    fits = len(image) <= self.max_file_bytes
                    label = int(self.labels[start + row])
                    location = f"{url}: row {row} of column {self.column!r}"
                    data = image if fits else None
                    yield Sample(_key(file, row), label, data, location, next(captions))
            start += file.rows


def table_source(
    folder: str,
    tables: Mapping[str, ObjectState],
    options: PackConfig,
    left_out: tuple[NamedGroup, ...] = (),
) -> TableSource:
    """Return the rows of these tables. Raises DatasetError if a column cannot be determined."""
    files: list[TableFile] = []
    labels: list[Label] = []
    others: set[str] = set()
    names: tuple[str, ...] | None = None
    column = ""
    captions, captioned = CaptionCollector(options), set[str]()
    for table, state in tables.items():
        url = object_store.join(folder, table)
        file = table_files.open_table(url, table, state.size)
        chosen = _image_column(url, file.schema, options.image_key)
        label = _label_column(url, file.schema, options.label_key)
        stated = _class_names(file.schema, label)
        if files and (chosen, stated) != (column, names):
            problem = f"its image column or its class names differ from those of {files[0].name}"
            raise DatasetError(url, problem, "pack tables with equal columns")
        column, names = chosen, stated
        texts = _caption_column(url, file.schema, options)
        if texts:
            captioned.add(texts)
            for row, value in enumerate(table_files.read_captions_of(url, file, texts)):
                captions.add(_key(file, row), value, url, f"row {row}: ")
        others |= set(file.schema.names) - {column, label, texts}
        files.append(file)
        labels += table_files.read_labels(url, file, label) if label else [None] * file.rows
    if not labels:
        raise DatasetError(folder, "its tables have no rows", "give tables with images")
    require_caption_key(bool(captioned), options, folder)
    label_names, numbers = _numbered(folder, labels, names)
    keys = [_key(file, row) for file in files for row in range(file.rows)] if captioned else []
    return TableSource(
        folder,
        tuple(files),
        column,
        np.asarray(numbers, np.int64),
        label_names,
        options.max_file_bytes,
        left_out + named_groups([(COLUMNS, others)]) + captions.left_out(keys),
        version_of(tables),
        captions.column(keys),
    )


def _key(file: TableFile, row: int) -> str:
    """Return the key of the sample in a row."""
    return f"{printable_name(file.name)}:{row:06d}"


def _caption_column(url: str, schema: pa.Schema, options: PackConfig) -> str:
    """Return the name of the column of captions; empty if there is none."""
    if options.captions:
        return ""
    fitting = [field.name for field in schema if table_files.holds_captions(field.type)]
    if (key := options.caption_key) in schema.names and key not in fitting:
        problem = f"column {key!r} is {schema.field(key).type}, which cannot hold captions"
        raise DatasetError(url, problem, "choose a column of texts, or lists of them: caption_key=")
    return caption_key_of(fitting, options, url) or ""


def _image_column(url: str, schema: pa.Schema, image_key: str) -> str:
    fitting: list[str] = [field.name for field in schema if table_files.holds_files(field.type)]
    if image_key:
        if image_key in fitting:
            return image_key
        shown = ", ".join(f"{field.name} {field.type}" for field in schema)[:300]
        problem = f"{image_key!r} (image_key) is not a column of image files; it has {shown}"
        raise DatasetError(url, problem, "name a column of binary, or of bytes and path")
    stated = [name for name, kind in _features(schema).items() if kind.get("_type") == "Image"]
    named = [name for name in fitting if name in stated] or [
        name for name in fitting if name.lower() in IMAGES
    ]
    if len(named) == 1:
        return named[0]
    if named:
        problem = f"it has {len(named)} columns of images ({', '.join(named)})"
        raise DatasetError(url, problem, f"choose one, as in image_key={named[0]}")
    shown = ", ".join(f"{field.name} {field.type}" for field in schema)[:300]
    problem = f"no column named {', '.join(IMAGES)} holds image files; it has {shown}"
    raise DatasetError(url, problem, "name a column of binary, or of bytes and path: image_key=")


def _label_column(url: str, schema: pa.Schema, label_key: str) -> str:
    """Return the name of the label column; empty if there is none."""
    if label_key and label_key not in schema.names:
        problem = f"it has no column {label_key!r} (label_key)"
        raise DatasetError(url, problem, f"choose one of {', '.join(schema.names)[:300]}")
    label = label_key or (LABEL if LABEL in schema.names else "")
    if label and not table_files.holds_labels(schema.field(label).type):
        problem = f"column {label!r} is {schema.field(label).type}, which cannot hold labels"
        raise DatasetError(url, problem, "choose a column of whole numbers or names: label_key=")
    return label


def _features(schema: pa.Schema) -> dict[str, dict[str, object]]:
    """Return the column features that Hugging Face Datasets stores in the schema, if any."""
    try:
        held = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = held["info"]["features"]
        return {str(name): kind for name, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    names = _features(schema).get(label, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names[: class_names.MAX_CLASSES])


def _numbered(
    folder: str, labels: list[Label], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[int]]:
    unlabelled = sum(label is None for label in labels)
    if 0 < unlabelled < len(labels):
        first = labels.index(None)
        problem = f"{unlabelled} of {len(labels)} rows have no label; the first is row {first}"
        raise DatasetError(folder, problem, "give every row a label, or none")
    try:
        label_names, numbers = class_names.number_labels(labels)
    except ValueError as error:
        remedy = "write all labels as numbers or all as names"
        raise DatasetError(folder, str(error), remedy) from None
    if names is None or unlabelled:
        return label_names, numbers
    if len(label_names) > len(names):
        problem = (
            f"label {len(label_names) - 1} occurs, but the schema names only "
            f"{counted(len(names), 'class', 'classes')}"
        )
        raise DatasetError(folder, problem, "write the tables again with all class names")
    return names, numbers
