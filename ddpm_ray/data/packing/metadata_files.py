"""Read labels and captions from `metadata.csv` and `metadata.jsonl`.

This is the format of Hugging Face's ImageFolder. Each row names an image by `file_name`, relative
to the metadata file. Shards cannot store columns other than labels and captions; they are listed
as not packed.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import class_names
from ddpm_ray.data.packing.caption_collector import CaptionCollector, caption_key_of
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.data.packing.source_files import SourceFiles
from ddpm_ray.data.samples import NamedGroup, named_groups
from ddpm_ray.storage import object_store

FILE_NAME, LABEL = "file_name", "label"
MISSING = "images that a metadata file names but that do not exist"
UNLISTED = "images that no metadata file names (packed as well)"


@dataclass
class Metadata:
    """The contents of a folder's metadata files."""

    files: list[str] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)  # by image; empty: none has a label
    captioned: set[str] = field(default_factory=set)  # the files that have captions
    left_out: tuple[NamedGroup, ...] = ()


def read_metadata(
    url: str, files: SourceFiles, options: PackConfig, collector: CaptionCollector
) -> Metadata:
    """Read all metadata files below `url`; `collector` gets their captions.

    Raises DatasetError, which names file and line.
    """
    found = Metadata(list(files.metadata))
    named: set[str] = set()
    missing: list[str] = []
    columns: dict[str, set[str]] = {}
    for file, state in files.metadata.items():
        where = object_store.join(url, file)
        if state.size > options.max_file_bytes:
            problem = f"a file of more than {options.max_file_bytes} bytes (max_file_bytes)"
            raise DatasetError(where, problem, "raise max_file_bytes if you trust it")
        label_key = options.label_key or LABEL
        for line, row in _rows(where, object_store.read_bytes(where)):
            if not isinstance(name := row.get(FILE_NAME), str) or not name:
                problem = f"line {line} has no {FILE_NAME}"
                raise DatasetError(where, problem, f"name the image's file in {FILE_NAME}")
            image = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
            caption_key = None if options.captions else caption_key_of(row, options, where)
            found.captioned |= {file} if caption_key else set()
            used = {FILE_NAME, label_key, caption_key}
            columns.setdefault(file, set()).update(row.keys() - used)
            if image not in files.images:
                missing.append(image)
                if options.on_bad_image == "stop":
                    problem = f"line {line} names {name!r}, and there is no such image"
                    remedy = "add the image, delete the line, or use on_bad_image=skip"
                    raise DatasetError(where, problem, remedy)
                continue
            label = _label(row.get(label_key), where, line)
            if image in named and (caption_key is None or found.labels[image] != label):
                problem = f"line {line} names {name!r} a second time"
                raise DatasetError(where, problem, "delete one of the two")
            named.add(image)
            found.labels[image] = label
            collector.add(image, row.get(caption_key or ""), where, f"line {line}: ")
    if options.label_key and files.metadata and not any(_known(found.labels)):
        problem = f"no row has a value in {options.label_key!r} (label_key)"
        raise DatasetError(url, problem, "check its spelling, or leave label_key empty")
    found.labels = _as_numbers(found.labels) if any(_known(found.labels)) else {}
    unlisted = set(files.images) - named if found.files and not found.labels else set()
    others = [
        (f"columns of {file} not supported in shards", names) for file, names in columns.items()
    ]
    found.left_out = named_groups([*others, (MISSING, missing), (UNLISTED, unlisted)])
    return found


def _known(labels: dict[str, Label]) -> Iterator[bool]:
    return (label is not None for label in labels.values())


def _as_numbers(labels: dict[str, Label]) -> dict[str, Label]:
    """Convert text labels of a CSV to numbers if all of them are whole numbers."""
    texts = [label for label in labels.values() if label is not None]
    if all(isinstance(text, str) and str(_number(text)) == text for text in texts):
        return {name: text and _number(str(text)) for name, text in labels.items()}
    return labels


def _number(text: str) -> int:
    number = int(text) if class_names.is_whole_number(text) else -1
    return number if number < class_names.MAX_CLASSES else -1


def _label(value: object, where: str, line: int) -> Label:
    if value == "":  # an empty cell of a CSV
        return None
    try:
        return class_names.check_label(value, f"line {line}")
    except ValueError as error:
        remedy = "write a whole number from 0, or a class name"
        raise DatasetError(where, f"line {line}: {error}", remedy) from None


def _rows(where: str, data: bytes) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the line number and columns of each row."""
    lines = 1
    try:
        text = data.decode("utf-8-sig")
        if where.lower().endswith(".csv"):
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="")
            if FILE_NAME not in (names := reader.fieldnames or []):
                raise ValueError(f"its columns are {', '.join(names)[:200]}: none is {FILE_NAME}")
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            for row in reader:
                lines = reader.line_num
                if "" in row or None in row.values():
                    raise ValueError(f"it does not have {len(names)} cells")
                yield lines, dict(row)
        else:
            for lines, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield lines, row
    except (ValueError, RecursionError, csv.Error) as error:
        text = " ".join(str(error).split())
        raise DatasetError(where, f"line {lines}: {text}", "correct or delete it") from None
