"""Captions of a folder's images from caption files, text files or metadata.

A line of captions.tsv is a file and a caption, with a tab between them; a line of captions.jsonl is
{"file": ..., "caption": ...}. Files are relative to the folder of the caption file, or, where the
option `captions` names it, to the source. A text file next to an image, of the same name but for
the suffix, has one caption a line.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing.caption_collector import (
    NONE,
    CaptionCollector,
    captions_of,
    require_caption_key,
)
from ddpm_ray.data.packing.file_source import READERS
from ddpm_ray.data.packing.source_files import SourceFiles
from ddpm_ray.storage import object_state, object_store

TSV, JSONL = ".tsv", ".jsonl"
FILE_KEYS = ("file", "file_name")


def collect_captions(
    url: str,
    files: SourceFiles,
    options: PackConfig,
    collector: CaptionCollector,
    metadata: Collection[str],
) -> None:
    """Read the captions of a folder, unless the files `metadata` have them.

    Raises DatasetError for bad captions (on_bad_caption "stop"), and if two kinds of files have
    captions.
    """
    if options.captions == NONE:
        return
    if options.captions:
        where = object_store.absolute(options.captions, Path.cwd())
        if not where.lower().endswith((TSV, JSONL)):
            remedy = "name a file of captions: captions="
            raise DatasetError(where, "not a .tsv or .jsonl file", remedy)
        _require_size(where, object_state.state(where).size, options)
        _read_file(where, "", files.images, options, collector)
        collector.require_images(where)
        require_caption_key(where.endswith(JSONL) and not collector.is_empty, options, where)
        return
    texts = files.texts_of_images()
    kinds = {suffix: [f for f in files.captions if f.endswith(suffix)] for suffix in (TSV, JSONL)}
    found = [sorted(held)[0] for held in (*kinds.values(), metadata, texts.values()) if held]
    if len(found) > 1:
        problem = f"it has captions in {' and '.join(found)}"
        remedy = "remove all but one kind, or choose: captions=FILE, or captions=none"
        raise DatasetError(url, problem, remedy)
    files.used.update(files.captions, texts.values())
    for file, state in files.captions.items():
        where = object_store.join(url, file)
        _require_size(where, state.size, options)
        _read_file(where, posixpath.dirname(file), files.images, options, collector)
        collector.require_images(where)
    if texts:
        _read_texts(url, files, texts, options, collector)
    keyed = bool(metadata) or (bool(kinds[JSONL]) and not collector.is_empty)
    require_caption_key(keyed, options, url)


def _read_file(
    where: str,
    folder: str,
    images: Collection[str],
    options: PackConfig,
    collector: CaptionCollector,
) -> None:
    """Add the captions of one .tsv or .jsonl file."""
    is_table = where.lower().endswith(TSV)
    for number, line in _lines(where, object_store.read_bytes(where), collector):
        place, value = f"line {number}", cast(object, None)
        if is_table:
            name, tab, value = line.partition("\t")
            if not tab:
                collector.refuse_line(place, where, f"{place} has no tab")
                continue
            if number == 1 and name in FILE_KEYS:
                continue
        else:
            row = _row(line)
            name = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), "")
            value = captions_of(row, options, where)
        if not name:
            collector.refuse_line(place, where, f"{place} names no image file")
            continue
        image = posixpath.normpath(posixpath.join(folder, name))
        if image in images:
            collector.add(image, value, where, f"{place}: ")
        else:
            collector.miss(image)


def _lines(where: str, data: bytes, collector: CaptionCollector) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, with their numbers."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError:
            collector.refuse_line(f"line {number}", where, f"line {number} is not UTF-8")
            continue
        if text.strip():
            yield number, text


def _row(line: str) -> dict[str, Any]:
    """Return the JSON object of a line; empty if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _read_texts(
    url: str,
    files: SourceFiles,
    texts: dict[str, str],
    options: PackConfig,
    collector: CaptionCollector,
) -> None:
    """Add the captions in text files, given by image."""

    def read(file: str) -> bytes:
        where = object_store.join(url, file)
        _require_size(where, files.texts[file].size, options)
        return object_store.read_bytes(where)

    with ThreadPoolExecutor(1 if object_store.is_local(url) else READERS) as pool:
        for (image, file), data in zip(texts.items(), pool.map(read, texts.values()), strict=True):
            collector.add_lines(image, data, object_store.join(url, file))


def _require_size(where: str, size: int, options: PackConfig) -> None:
    if size > options.max_file_bytes:
        problem = f"a file of more than {options.max_file_bytes} bytes (max_file_bytes)"
        raise DatasetError(where, problem, "raise max_file_bytes if you trust it")
