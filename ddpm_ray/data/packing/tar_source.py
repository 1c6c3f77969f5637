"""Source for WebDataset tars: a sample is the files that share a name up to its first dot.

Its image is the one file with an image suffix, its label the number in `.cls`, or the number or
name in `.json` under "label" or "cls". Its captions are the lines of `.txt`, or, where caption_key
is set or no sample has a `.txt`, those in `.json`. Other members are listed as not packed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import class_names
from ddpm_ray.data.packing.caption_collector import (
    CAPTION_KEYS,
    CaptionCollector,
    require_caption_key,
)
from ddpm_ray.data.packing.class_names import Label
from ddpm_ray.data.packing.file_source import FileSource, Member, open_object, version_of
from ddpm_ray.data.packing.image_files import is_image
from ddpm_ray.data.packing.source_files import HIDDEN, is_hidden
from ddpm_ray.data.packing.tar_members import members
from ddpm_ray.data.samples import NamedGroup, named_groups, printable_name
from ddpm_ray.storage import object_store
from ddpm_ray.storage.object_state import ObjectState

MAX_LABEL_BYTES = 2**20  # of .cls, .json and .txt files
LABEL_KEYS = ("label", "cls")  # keys of .json files, in order of preference

SPECIAL = "links, devices and sparse files in tars"
NOT_CHOSEN = "further images of samples, not chosen by image_key"
NO_IMAGE = "samples of tars without an image"
OTHER_KEYS = "keys of .json files not supported in shards"
MAX_KINDS = 50  # suffixes of other members that are listed separately


@dataclass
class Contents:
    """The contents of one tar, by sample key."""

    # By suffix: offset and size.
    images: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    cls_labels: dict[str, Label] = field(default_factory=dict)
    json_labels: dict[str, Label] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)  # of .txt files
    json_captions: dict[str, tuple[str, object]] = field(default_factory=dict)  # with their key


def tar_source(
    folder: str,
    tars: Mapping[str, ObjectState],
    options: PackConfig,
    left_out: tuple[NamedGroup, ...] = (),
) -> FileSource:
    """Return the samples of these tars, ordered by tar and key. Raises DatasetError."""
    found: list[tuple[Member, Label]] = []
    captions: dict[str, Contents] = {}
    others: dict[str, list[str]] = defaultdict(list)
    json_keys: set[str] = set()
    for tar in sorted(tars):
        url = object_store.join(folder, tar)
        contents = captions[tar] = _read_tar(url, options, others, json_keys)
        found.extend(
            (Member(tar, key, -1, *image), _label(url, key, contents))
            for key in sorted(contents.images)
            if (image := _image(url, key, contents.images[key], options, others)) is not None
        )
        labelled = contents.cls_labels.keys() | contents.json_labels.keys()
        others[NO_IMAGE] += sorted(labelled - contents.images.keys())
    collector = _collected(folder, captions, options, json_keys)
    names = [_name(member.file, member.key) for member, _ in found]
    left = left_out + named_groups([*others.items(), (OTHER_KEYS, json_keys)])
    if not found:
        contained = f" (they hold {'; '.join(map(str, left))})" if left else ""
        remedy = "give tars with image files"
        raise DatasetError(folder, f"its tars have no image{contained}", remedy)
    labels = [label for _, label in found]
    if options.label_key and not any(label is not None for label in labels):
        problem = f"no .json file has a value in {options.label_key!r} (label_key)"
        raise DatasetError(folder, problem, "check its spelling, or leave label_key empty")
    if None in labels and any(label is not None for label in labels):
        key = next(member.key for member, label in found if label is None)
        remedy = "give every sample a .cls file, or none"
        raise DatasetError(folder, f"some samples have a label, but {key} has none", remedy)
    try:
        label_names, numbers = class_names.number_labels(labels)
    except ValueError as error:
        remedy = "write all labels as numbers or all as names"
        raise DatasetError(folder, str(error), remedy) from None
    samples = (
        member._replace(label=number) for (member, _), number in zip(found, numbers, strict=True)
    )
    version = version_of(tars)
    left += collector.left_out(names)
    column = collector.column(names)
    limit = options.max_file_bytes
    return FileSource(folder, tuple(samples), label_names, limit, left, version, column)


def _name(tar: str, key: str) -> str:
    """Return the name of a sample among those of all tars."""
    return f"{tar}: {key}"


def _collected(
    folder: str, tars: Mapping[str, Contents], options: PackConfig, json_keys: set[str]
) -> CaptionCollector:
    """Return the captions of all samples; adds keys of unused ones to `json_keys`."""
    collector = CaptionCollector(options)
    has_texts = any(contents.texts for contents in tars.values())
    require_caption_key(any(c.json_captions for c in tars.values()), options, folder)
    for tar, contents in tars.items():
        url = object_store.join(folder, tar)
        if has_texts:  # img2dataset writes the caption into both
            json_keys.update(key for key, _ in contents.json_captions.values())
            for key in contents.texts.keys() & contents.images.keys():
                collector.add_lines(_name(tar, key), contents.texts[key], url, f"{key}.txt: ")
            continue
        for key in contents.json_captions.keys() & contents.images.keys():
            value = contents.json_captions[key][1]
            collector.add(_name(tar, key), value, url, f"{key}.json: ")
    return collector


def _read_tar(
    url: str, options: PackConfig, others: dict[str, list[str]], json_keys: set[str]
) -> Contents:
    """Read the tar at `url`; members that belong to no sample are added to `others`."""
    contents = Contents()
    reads_texts = not options.captions and not options.caption_key
    names: set[str] = set()
    with open_object(url) as stream:
        for info in members(stream, url):
            if info.isdir():
                continue
            parent, _, last = info.name.rpartition("/")
            stem, _, suffix = last.partition(".")
            shown = printable_name(info.name)
            key = printable_name(f"{parent}/{stem}".lstrip("/"))
            if not info.isfile() or info.issparse():  # a sparse file may claim any size
                others[SPECIAL].append(shown)
                continue
            if is_hidden(last):
                others[HIDDEN].append(shown)
                continue
            if info.name in names:
                raise DatasetError(url, f"it holds {shown} twice", "remove one of the two")
            names.add(info.name)
            if is_image(f".{suffix}"):
                contents.images.setdefault(key, {})[suffix] = info.offset_data, info.size
            elif suffix in ("cls", "json") or (suffix == "txt" and reads_texts):
                stream.seek(info.offset_data)
                data = stream.read(min(info.size, MAX_LABEL_BYTES + 1))
                match suffix:
                    case "cls":
                        contents.cls_labels[key] = _cls_label(url, shown, data)
                    case "txt":
                        contents.texts[key] = _text(url, shown, data)
                    case _:
                        _read_json(url, shown, key, data, options, contents, json_keys)
            else:
                kind = f".{suffix} files in tars" if suffix else "files in tars without a suffix"
                known = kind in others or len(others) < MAX_KINDS
                others[kind if known else "other files in tars"].append(shown)
    return contents


def _image(
    url: str,
    key: str,
    images: dict[str, tuple[int, int]],
    options: PackConfig,
    others: dict[str, list[str]],
) -> tuple[int, int] | None:
    """Return offset and size of the sample's image; None if it lacks the chosen one."""
    chosen = options.image_key or next(iter(images))
    further = [f"{key}.{suffix}" for suffix in images if suffix != chosen]
    if further and not options.image_key:
        shown = ", ".join(f"{key}.{suffix}" for suffix in sorted(images)[:3])
        problem = f"sample {key!r} has {len(images)} images ({shown})"
        raise DatasetError(
            url,
            f"{problem}, because a sample's name ends at the first dot",
            f"rename them, or choose one, as in image_key={min(images)}",
        )
    others[NOT_CHOSEN] += further
    return images.get(chosen)


def _label(url: str, key: str, contents: Contents) -> Label:
    number, stated = contents.cls_labels.get(key), contents.json_labels.get(key)
    if isinstance(number, int) and isinstance(stated, int) and number != stated:
        problem = f"{key}.cls has label {number}, but {key}.json has {stated}"
        raise DatasetError(url, problem, "make them equal, or remove one of the two")
    return number if number is not None else stated


def _cls_label(url: str, name: str, data: bytes) -> Label:
    text = data.decode("ascii", "replace").strip()
    if not class_names.is_whole_number(text.removeprefix("-")):
        problem = f"{name} holds {text[:40]!r}, which is not a label"
        raise DatasetError(url, problem, "write a whole number from 0 into it")
    return _checked(url, name, int(text))


def _text(url: str, name: str, data: bytes) -> bytes:
    """Return the bytes of a .txt file. Raises DatasetError."""
    if len(data) > MAX_LABEL_BYTES:
        problem = f"{name} has more than {MAX_LABEL_BYTES} bytes"
        raise DatasetError(url, problem, "shorten it, or use captions=none")
    return data


def _read_json(
    url: str,
    name: str,
    sample: str,
    data: bytes,
    options: PackConfig,
    contents: Contents,
    json_keys: set[str],
) -> None:
    """Add label and captions of a sample's .json file; other keys are added to `json_keys`."""
    if len(data) > MAX_LABEL_BYTES:
        problem = f"{name} has more than {MAX_LABEL_BYTES} bytes"
        raise DatasetError(url, problem, "put its label into a .cls file")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise DatasetError(url, f"{name} is not JSON ({text})", "correct or remove it") from None
    if not isinstance(found, dict):
        json_keys.add(f"(a {type(found).__name__})")
        contents.json_labels[sample] = None
        return
    wanted: Iterable[str] = (options.label_key,) if options.label_key else LABEL_KEYS
    label_key = next((key for key in wanted if key in found), None)
    caption_key = None
    if not options.captions:
        keys = (options.caption_key,) if options.caption_key else CAPTION_KEYS
        caption_key = next((key for key in keys if key in found), None)
    if caption_key is not None:
        contents.json_captions[sample] = caption_key, found[caption_key]
    if len(json_keys) < 10 * MAX_KINDS:
        json_keys.update(found.keys() - {label_key, caption_key})
    label = None if label_key is None else _checked(url, name, found[label_key])
    contents.json_labels[sample] = label


def _checked(url: str, name: str, value: object) -> Label:
    try:
        return class_names.check_label(value, name)
    except ValueError as error:
        remedy = "write a whole number from 0, or a class name"
        raise DatasetError(url, f"{name}: {error}", remedy) from None
