"""Report on every file of a packed source: packed, changed, skipped or not packed.

It is stored next to the shards as `packing.json` and is not part of the data set's fingerprint. A
later job reads it to recognise a finished data set and to print the same report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.samples import MAX_EXAMPLES, NamedGroup
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed_json, object_store

RECORD = "packing.json"
MAX_NAMED = 1000  # skipped files that are stored by name; all are counted
MAX_SHOWN = 10  # of these, printed on the terminal
MAX_CLASSES_SHOWN = 40


@dataclass(frozen=True)
class PackReport:
    """Skipped files, contents not packed, changed images, and packed samples per class."""

    skipped: int
    skipped_files: tuple[str, ...]  # one line for each of the first MAX_NAMED
    left_out: tuple[NamedGroup, ...]  # contents of the source that were not packed
    changed: tuple[NamedGroup, ...]  # changes made to images after decoding
    class_samples: tuple[int, ...]  # packed samples of each class
    captioned: int = 0  # packed samples with a caption
    captions: int = 0  # of all packed samples


@dataclass(frozen=True)
class PackRecord:
    """The origin of a data set: its source and the options that the manifest does not hold."""

    source: str  # as the user gave it, without secrets
    source_sha256: str
    version: str  # Source.version
    content_sha256: str  # of the bytes of its files
    options: Mapping[str, Any]
    report: PackReport


def write_record(destination: str, record: PackRecord) -> None:
    """Store the record next to the shards. Raises StorageError."""
    checksummed_json.write(object_store.join(destination, RECORD), asdict(record))


def read_record(dataset: Dataset) -> PackRecord | None:
    """Return the record of a data set; None if it has none. Raises StorageError."""
    where = object_store.join(dataset.url, RECORD)
    record = checksummed_json.read_as(where, "a packing record", _record)
    if record is None or record.source_sha256 != dataset.manifest.source_sha256:
        return None
    return record


def _record(held: Any) -> PackRecord:
    fields = held.pop("report")
    report = PackReport(
        fields["skipped"],
        tuple(fields["skipped_files"]),
        tuple(map(NamedGroup.from_json, fields["left_out"])),
        tuple(map(NamedGroup.from_json, fields["changed"])),
        tuple(fields["class_samples"]),
        fields.get("captioned", 0),
        fields.get("captions", 0),
    )
    return PackRecord(**held, report=report)


def require_same(dataset: Dataset, record: PackRecord | None, options: Mapping[str, Any]) -> None:
    """Raise DatasetError if the data set was packed with other options."""
    if record is None:
        return
    changed = [
        f"{key}={record.options.get(key)!r}, now {options[key]!r}"
        for key in sorted(options)
        if record.options.get(key) != options[key]
    ]
    if changed:
        raise other_dataset(dataset.url, f"packed with {'; '.join(changed)}")


def other_dataset(destination: str, how: str) -> DatasetError:
    """Return the error for a destination that already holds a different data set."""
    problem = f"a different data set is already here ({how})"
    remedy = "delete it, or choose another destination"
    return DatasetError(destination, problem, remedy)


def merge_groups(parts: Iterable[NamedGroup]) -> tuple[NamedGroup, ...]:
    """Merge groups of the same kind; `parts` must be in the order of their names."""
    counts: dict[str, int] = defaultdict(int)
    examples: dict[str, list[str]] = defaultdict(list)
    for group in parts:
        counts[group.kind] += group.count
        examples[group.kind] += group.examples
    return tuple(
        NamedGroup(kind, counts[kind], tuple(examples[kind][:MAX_EXAMPLES]))
        for kind in sorted(counts)
    )


def job_result(dataset: Dataset, report: PackReport | None) -> dict[str, Any]:
    """Return the result of a packing job for JSON; null: packed by a version without a report."""
    manifest = dataset.manifest
    return {
        "destination": dataset.url,
        "samples": manifest.samples,
        "shards": manifest.shards,
        "image_shape": list(manifest.image_shape),
        "channels": manifest.image_shape[-1],
        "classes": list(manifest.label_names),
        "class_samples": list(report.class_samples) if report else None,
        "captioned": report.captioned if report else None,
        "captions": manifest.captions,
        "skipped": report.skipped if report else None,
        "skipped_files": list(report.skipped_files) if report else None,
        "not_packed": [asdict(group) for group in report.left_out] if report else None,
        "changed": [asdict(group) for group in report.changed] if report else None,
        "fingerprint": dataset.fingerprint,
    }


def lines(dataset: Dataset, report: PackReport | None) -> Iterator[str]:
    """Yield the last lines that a packing job prints; control characters in names are escaped."""
    manifest, counts = dataset.manifest, list[int]()
    if report is None:
        yield "packed by an earlier version, which stored no report on skipped or changed files"
    else:
        counts = list(report.class_samples)
        yield from (f"skipped: {sanitize(line)}" for line in report.skipped_files[:MAX_SHOWN])
        if report.skipped > MAX_SHOWN:
            yield f"skipped: {report.skipped} files in total; {RECORD} lists {MAX_NAMED} of them"
        yield from (f"not packed: {sanitize(str(group))}" for group in report.left_out)
        yield from (f"changed: {sanitize(str(group))}" for group in report.changed)
    height, width, channels = manifest.image_shape
    colours = "RGB" if channels == 3 else "grey"
    skipped = f", {report.skipped} skipped" if report else ""
    size = f"{width} x {height} pixels, {counted(channels, 'channel')} ({colours})"
    yield f"packed: {counted(manifest.samples, 'sample')}{skipped}, {size}"
    if report and manifest.captioned:
        share = f"{report.captioned} of {counted(manifest.samples, 'sample')}"
        yield f"captions: {manifest.captions}, of {share}"
    names = manifest.label_names
    if not names:
        yield "classes: none"
        return
    shown = [
        f"{n} = {sanitize(name)}" + (f" ({counts[n]}{' samples' * (n == 0)})" if counts else "")
        for n, name in enumerate(names[:MAX_CLASSES_SHOWN])
    ]
    more = f", ... {len(names)} in total" if len(names) > MAX_CLASSES_SHOWN else ""
    yield f"classes: {', '.join(shown)}{more}"
