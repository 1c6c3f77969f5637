"""Samples of WebDataset tars: files that share a name up to the first dot of their last part.

A sample's image is its one file with an image's suffix, its label the number in `.cls`, or the
number or name in `.json` under "label" or "cls". Whatever else a tar holds is named.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ddpm_ray.config.pack import PackConfig
from ddpm_ray.data.packing import class_names
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.data.packing.file_source import FileSource, Member, opened, version_of
from ddpm_ray.data.packing.image_files import is_image
from ddpm_ray.data.packing.source_files import HIDDEN, is_hidden
from ddpm_ray.data.packing.tar_members import members
from ddpm_ray.data.samples import NamedGroup, groups, printable_name
from ddpm_ray.data.shards import DatasetError
from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_store import ObjectState

MOST_LABEL_BYTES = 2**20
LABELS = ("label", "cls")  # keys of .json, the first that is there

ODD = "links, devices and sparse files in tars"
FURTHER = "further images of samples, not chosen by image_key"
IMAGELESS = "samples of tars without an image"
KEYS = "keys of .json files without a place in a shard"
MOST_KINDS = 50  # suffixes of other members that are counted separately


@dataclass
class Contents:
    """What one tar holds, by the keys of its samples."""

    images: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # by suffix
    numbers: dict[str, Label] = field(default_factory=dict)  # of .cls
    stated: dict[str, Label] = field(default_factory=dict)  # of .json


def tar_source(
    folder: str,
    tars: Mapping[str, ObjectState],
    options: PackConfig,
    left_out: tuple[NamedGroup, ...] = (),
) -> FileSource:
    """The samples of these tars, in the order of tars and then keys. Raises DatasetError."""
    found: list[tuple[Member, Label]] = []
    others: dict[str, list[str]] = defaultdict(list)
    json_keys: set[str] = set()
    for tar in sorted(tars):
        url = object_store.join(folder, tar)
        contents = _contents(url, options, others, json_keys)
        found.extend(
            (Member(tar, key, -1, *image), _label(url, key, contents))
            for key in sorted(contents.images)
            if (image := _image(url, key, contents.images[key], options, others)) is not None
        )
        bare = (contents.numbers.keys() | contents.stated.keys()) - contents.images.keys()
        others[IMAGELESS] += sorted(bare)
    left = left_out + groups([*others.items(), (KEYS, json_keys)])
    if not found:
        contents_text = f" (it holds {'; '.join(map(str, left))})" if left else ""
        remedy = "give tars with image files"
        raise DatasetError(folder, f"there is no image in its tars{contents_text}", remedy)
    labels = [label for _, label in found]
    if options.label_key and not any(label is not None for label in labels):
        problem = f"no .json file has a value in {options.label_key!r} (label_key)"
        raise DatasetError(folder, problem, "check its spelling, or leave label_key empty")
    if None in labels and any(label is not None for label in labels):
        bare_key = next(member.key for member, label in found if label is None)
        remedy = "give every sample a .cls or none"
        raise DatasetError(folder, f"some samples have a label and {bare_key} has none", remedy)
    try:
        label_names, numbers = class_names.numbered(labels)
    except ValueError as error:
        remedy = "write all labels as numbers or all as names"
        raise DatasetError(folder, str(error), remedy) from None
    samples = (
        member._replace(label=number) for (member, _), number in zip(found, numbers, strict=True)
    )
    version = version_of(tars)
    return FileSource(folder, tuple(samples), label_names, options.max_file_bytes, left, version)


def _contents(
    url: str, options: PackConfig, others: dict[str, list[str]], json_keys: set[str]
) -> Contents:
    """What the tar at `url` holds; what is no part of a sample goes to `others`."""
    contents = Contents()
    names: set[str] = set()
    with opened(url) as stream:
        for info in members(stream, url):
            if info.isdir():
                continue
            parent, _, last = info.name.rpartition("/")
            stem, _, suffix = last.partition(".")
            shown = printable_name(info.name)
            key = printable_name(f"{parent}/{stem}".lstrip("/"))
            if not info.isfile() or info.issparse():  # a sparse one claims any size
                others[ODD].append(shown)
                continue
            if is_hidden(last):
                others[HIDDEN].append(shown)
                continue
            if info.name in names:
                raise DatasetError(url, f"{shown} is in it twice", "take one out")
            names.add(info.name)
            if is_image(f".{suffix}"):
                contents.images.setdefault(key, {})[suffix] = info.offset_data, info.size
            elif suffix in ("cls", "json"):
                stream.seek(info.offset_data)
                data = stream.read(min(info.size, MOST_LABEL_BYTES + 1))
                if suffix == "cls":
                    contents.numbers[key] = _number(url, shown, data)
                else:
                    contents.stated[key] = _stated(url, shown, data, options, json_keys)
            else:
                kind = f".{suffix} files in tars" if suffix else "files in tars without a suffix"
                known = kind in others or len(others) < MOST_KINDS
                others[kind if known else "other files in tars"].append(shown)
    return contents


def _image(
    url: str,
    key: str,
    images: dict[str, tuple[int, int]],
    options: PackConfig,
    others: dict[str, list[str]],
) -> tuple[int, int] | None:
    """Offset and size of the sample's image; None where it lacks the one that was chosen."""
    chosen = options.image_key or next(iter(images))
    further = [f"{key}.{suffix}" for suffix in images if suffix != chosen]
    if further and not options.image_key:
        shown = ", ".join(f"{key}.{suffix}" for suffix in sorted(images)[:3])
        problem = f"sample {key!r} has {len(images)} images ({shown})"
        raise DatasetError(
            url,
            f"{problem}, because the first dot of a file's name ends the sample's",
            f"rename them, or choose one, as in image_key={min(images)}",
        )
    others[FURTHER] += further
    return images.get(chosen)


def _label(url: str, key: str, contents: Contents) -> Label:
    number, stated = contents.numbers.get(key), contents.stated.get(key)
    if isinstance(number, int) and isinstance(stated, int) and number != stated:
        problem = f"{key}.cls says label {number}, and {key}.json {stated}"
        raise DatasetError(url, problem, "make them equal, or take one of the two out")
    return number if number is not None else stated


def _number(url: str, name: str, data: bytes) -> Label:
    text = data.decode("ascii", "replace").strip()
    if not class_names.is_whole_number(text.removeprefix("-")):
        problem = f"{name} holds {text[:40]!r}, which is no label"
        raise DatasetError(url, problem, "write a whole number from 0 into it")
    return _checked(url, name, int(text))


def _stated(url: str, name: str, data: bytes, options: PackConfig, json_keys: set[str]) -> Label:
    """The label in a .json file, or None; its other keys go to `json_keys`."""
    if len(data) > MOST_LABEL_BYTES:
        problem = f"{name} has more than {MOST_LABEL_BYTES} bytes"
        raise DatasetError(url, problem, "keep its label in a .cls file")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise DatasetError(url, f"{name} is no JSON ({text})", "mend it, or take it out") from None
    if not isinstance(found, dict):
        json_keys.add(f"(a {type(found).__name__})")
        return None
    wanted: Iterable[str] = (options.label_key,) if options.label_key else LABELS
    label_key = next((key for key in wanted if key in found), None)
    if len(json_keys) < 10 * MOST_KINDS:
        json_keys.update(found.keys() - {label_key})
    return None if label_key is None else _checked(url, name, found[label_key])


def _checked(url: str, name: str, value: object) -> Label:
    try:
        return class_names.checked(value, name)
    except ValueError as error:
        remedy = "write a whole number from 0 or a class's name"
        raise DatasetError(url, f"{name}: {error}", remedy) from None
