"""Source for a folder of images: flat, with a sub-folder per class, or with a metadata file."""

from __future__ import annotations

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import caption_files, class_names, metadata_files
from ddpm_ray.data.packing.caption_collector import CaptionCollector
from ddpm_ray.data.packing.file_source import FileSource, Member, version_of
from ddpm_ray.data.packing.metadata_files import Metadata
from ddpm_ray.data.packing.source_files import SPLITS, SourceFiles
from ddpm_ray.data.samples import named_groups, printable_name
from ddpm_ray.storage import object_store

EMPTY = "folders without an image, which are not used as classes"
NESTED = "names of folders inside the class folders"
UNUSED = "names of folders, not used as classes because a metadata file has the labels"


def folder_source(url: str, files: SourceFiles, options: PackConfig) -> FileSource:
    """Return the images of a folder. Raises DatasetError if their labels are ambiguous.

    Without metadata a flat folder has no labels, and each top-level sub-folder is a class that
    includes the images at any depth below it. Labels in a metadata file replace these classes.
    """
    _refuse_unused(url, files, options)
    captions = CaptionCollector(options)
    metadata = metadata_files.read_metadata(url, files, options, captions)
    caption_files.collect_captions(url, files, options, captions, metadata.captioned)
    names, tops = list(files.images), {name.split("/")[0] for name in files.images if "/" in name}
    if tops and tops <= SPLITS:
        problem = f"its sub-folders ({', '.join(sorted(tops))}) are splits, not classes"
        raise DatasetError(url, problem, f"give one of them: {object_store.join(url, min(tops))}")
    if metadata.labels:
        label_names, numbers = _labels_of_metadata(url, names, metadata)
        unused = [(UNUSED, tops)]
    elif metadata.files and len(tops) == 1:  # images/1.png next to metadata.csv
        label_names, numbers, unused = (), [-1] * len(names), [(UNUSED, tops)]
    else:
        label_names, numbers = _labels_of_folders(url, names, tops)
        nested = {"/".join(name.split("/")[:2]) for name in names if name.count("/") > 1}
        unused = [(EMPTY, files.folders - tops if tops else set()), (NESTED, nested)]
    states = {**files.images, **files.metadata}
    return FileSource(
        url,
        tuple(
            Member(name, printable_name(name), number, -1, files.images[name].size)
            for name, number in zip(names, numbers, strict=True)
        ),
        label_names,
        options.max_file_bytes,
        files.left_out + metadata.left_out + named_groups(unused) + captions.left_out(names),
        version_of(states),
        captions.column(names),
    )


def _refuse_unused(url: str, files: SourceFiles, options: PackConfig) -> None:
    """Raise DatasetError for an image_key or label_key that has no effect on this folder."""
    if options.image_key:
        problem = f"image_key is {options.image_key!r}, but each image of a folder is a sample"
        raise DatasetError(url, problem, "leave image_key empty; it is for tars and tables")
    if options.label_key and not files.metadata:
        problem = f"label_key is {options.label_key!r}, but there is no metadata.csv or .jsonl"
        raise DatasetError(url, problem, "add one, or leave label_key empty")


def _labels_of_folders(
    url: str, names: list[str], tops: set[str]
) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names and the label number of each image by its top-level folder."""
    flat = [name for name in names if "/" not in name]
    if tops and flat:
        problem = f"it has both images ({flat[0]}) and sub-folders ({min(tops)})"
        remedy = "put each image into the sub-folder of its class, or all into one folder"
        raise DatasetError(url, problem, remedy)
    label_names = class_names.sort_names(tops)
    number = {name: n for n, name in enumerate(label_names)}
    return label_names, [number.get(name.split("/")[0], -1) for name in names]


def _labels_of_metadata(
    url: str, names: list[str], metadata: Metadata
) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names and the label number of each image by the metadata file."""
    file = metadata.files[0]
    unlabelled = [name for name in names if metadata.labels.get(name) is None]
    if unlabelled:
        problem = (
            f"{len(unlabelled)} of {len(names)} images have no label; the first is {unlabelled[0]}"
        )
        remedy = "give every image a label, or none"
        raise DatasetError(object_store.join(url, file), problem, remedy)
    try:
        return class_names.number_labels([metadata.labels[name] for name in names])
    except ValueError as error:
        remedy = "write all labels as numbers or all as names"
        raise DatasetError(object_store.join(url, file), str(error), remedy) from None
