"""What became of every file of a source: packed, changed, skipped or left out.

It is kept beside the shards as `packing.json`, outside the data set's fingerprint. A later job uses
it to recognise a set that is packed already, and to report the same again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddpm_ray.data.samples import EXAMPLES, NamedGroup
from ddpm_ray.data.shards import Dataset, DatasetError
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.object_store import StorageError

RECORD = "packing.json"
MOST_NAMED = 1000  # lines of skipped files that are kept; all are counted
MOST_SHOWN = 10  # of them on a terminal
MOST_CLASSES_SHOWN = 40


@dataclass(frozen=True)
class PackReport:
    """What was skipped, left out or changed, and the packed samples of each class."""

    skipped: int
    skipped_files: tuple[str, ...]  # a line for each of the first MOST_NAMED
    left_out: tuple[NamedGroup, ...]  # what the source holds beside images
    changed: tuple[NamedGroup, ...]  # what was done to images beside decoding
    class_samples: tuple[int, ...]  # packed samples of each class


@dataclass(frozen=True)
class Record:
    """How a data set was packed; what it says of the data is in the manifest."""

    source: str  # as it was given, without a secret
    source_sha256: str
    version: str  # of the source's files
    content_sha256: str  # of their bytes
    options: Mapping[str, Any]  # those that the manifest does not hold
    report: PackReport


def write(destination: str, record: Record) -> None:
    """Put the record beside the shards. Raises StorageError."""
    checksummed_json.write(object_store.join(destination, RECORD), asdict(record))


def read(dataset: Dataset) -> Record | None:
    """The record of a data set; None for one that was packed without. Raises StorageError."""
    where = object_store.join(dataset.url, RECORD)
    if not object_store.exists(where):
        return None
    held = checksummed_json.read(where)
    try:
        fields = held.pop("report")
        report = PackReport(
            fields["skipped"],
            tuple(fields["skipped_files"]),
            tuple(map(NamedGroup.from_json, fields["left_out"])),
            tuple(map(NamedGroup.from_json, fields["changed"])),
            tuple(fields["class_samples"]),
        )
        record = Record(**held, report=report)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"not a record of packing ({type(error).__name__})"
        raise StorageError(where, problem, "remove this file") from None
    return record if record.source_sha256 == dataset.manifest.source_sha256 else None


def require_same(dataset: Dataset, record: Record | None, options: Mapping[str, Any]) -> None:
    """Raise DatasetError where the set was packed with other options than these."""
    if record is None:
        return
    changed = [
        f"{key}={record.options.get(key)!r}, now {options[key]!r}"
        for key in sorted(options)
        if record.options.get(key) != options[key]
    ]
    if changed:
        raise another(dataset.url, f"packed with {'; '.join(changed)}")


def another(destination: str, how: str) -> DatasetError:
    """The error of a destination that holds another data set than what is to be packed."""
    problem = f"another data set is here already ({how})"
    remedy = "remove it, or choose another destination for this one"
    return DatasetError(destination, problem, remedy)


def merged(parts: Iterable[NamedGroup]) -> tuple[NamedGroup, ...]:
    """One group for each kind, of groups that come in the order of their names."""
    counts: dict[str, int] = defaultdict(int)
    examples: dict[str, list[str]] = defaultdict(list)
    for group in parts:
        counts[group.kind] += group.count
        examples[group.kind] += group.examples
    return tuple(
        NamedGroup(kind, counts[kind], tuple(examples[kind][:EXAMPLES])) for kind in sorted(counts)
    )


def summary(dataset: Dataset, report: PackReport | None) -> dict[str, Any]:
    """The result of a packing job, for JSON; null is what an earlier version did not keep."""
    manifest = dataset.manifest
    return {
        "destination": dataset.url,
        "samples": manifest.samples,
        "shards": manifest.shards,
        "image_shape": list(manifest.image_shape),
        "channels": manifest.image_shape[-1],
        "classes": list(manifest.label_names),
        "class_samples": list(report.class_samples) if report else None,
        "skipped": report.skipped if report else None,
        "skipped_files": list(report.skipped_files) if report else None,
        "not_packed": [asdict(group) for group in report.left_out] if report else None,
        "changed": [asdict(group) for group in report.changed] if report else None,
        "fingerprint": dataset.fingerprint,
    }


def lines(dataset: Dataset, report: PackReport | None) -> Iterator[str]:
    """The last lines of a packing job, for people; names of strangers are spelt out."""
    manifest, counts = dataset.manifest, list[int]()
    if report is None:
        yield "packed before by a version that kept no list of what it skipped, changed or left out"
    else:
        counts = list(report.class_samples)
        yield from (f"skipped: {sanitize(line)}" for line in report.skipped_files[:MOST_SHOWN])
        if report.skipped > MOST_SHOWN:
            yield f"skipped: {report.skipped} files in all; {RECORD} names {MOST_NAMED} of them"
        yield from (f"not packed: {sanitize(str(group))}" for group in report.left_out)
        yield from (f"changed: {sanitize(str(group))}" for group in report.changed)
    height, width, channels = manifest.image_shape
    colours = "RGB" if channels == 3 else "grey"
    skipped = f", {report.skipped} skipped" if report else ""
    size = f"{width} x {height} pixels, {counted(channels, 'channel')} ({colours})"
    yield f"packed: {counted(manifest.samples, 'sample')}{skipped}, {size}"
    names = manifest.label_names
    if not names:
        yield "classes: none"
        return
    shown = [
        f"{n} = {sanitize(name)}" + (f" ({counts[n]}{' samples' * (n == 0)})" if counts else "")
        for n, name in enumerate(names[:MOST_CLASSES_SHOWN])
    ]
    more = f", ... {len(names)} in all" if len(names) > MOST_CLASSES_SHOWN else ""
    yield f"classes: {', '.join(shown)}{more}"
