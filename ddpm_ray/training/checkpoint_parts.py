"""The files of a checkpoint's tensors: a large group is split into parts of whole tensors.

Names and contents of the files depend on the tensors alone, not on the number of workers: any
number of workers writes the same files, and any number reads them. The names of parts are those
that other libraries use, as optimizer-00002-of-00004.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.tensor_file import ORDER

PART_BYTES = 512 * 2**20  # most bytes of a part's tensors, unless it is a single larger one
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")


def split(groups: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return the tensors (no copy) of each file by its name without suffix.

    A group of up to PART_BYTES is one file of the group's name.
    """
    files: dict[str, Tensors] = {}
    for group, tensors in groups.items():
        parts = _parts(tensors)
        names = [group] if len(parts) == 1 else part_names(group, len(parts))
        files |= dict(zip(names, parts, strict=True))
    return files


def part_names(group: str, count: int) -> list[str]:
    """Names of the `count` parts of a group, in order."""
    return [f"{group}-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]


def group_of(name: str) -> str:
    """Group of the file `name`, without suffix: of optimizer-00002-of-00004 it is optimizer."""
    match = PART.fullmatch(name)
    return match[1] if match else name


def is_split(names: Iterable[str]) -> bool:
    """Whether any of the files, named without suffix, is a part."""
    return any(PART.fullmatch(name) for name in names)


def files_of_group(group: str, names: Iterable[str]) -> list[str]:
    """Files of `group` among `names`, without suffix, in order: itself, or all of its parts.

    Raises ValueError if files of more than one splitting are there, and KeyError if one is missing.
    """
    found = sorted(name for name in names if group_of(name) == group)
    counts = {match[3] for match in map(PART.fullmatch, found) if match}
    wanted = part_names(group, int(*counts)) if len(counts) == 1 else [group]
    if missing := set(wanted) - set(found):
        raise KeyError(min(missing))
    if found != wanted:
        raise ValueError(f"{group} is there twice: {', '.join(found)}")
    return found


def shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Worker by file: the largest file first, to the worker with the fewest bytes.

    A function of names and sizes, whatever their order. No worker has more than the mean and one
    file.
    """
    loads = [0] * count
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        worker = loads.index(min(loads))
        found[name] = worker
        loads[worker] += sizes[name]
    return found


def size_of(tensors: Tensors) -> int:
    """Bytes of `tensors`."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _parts(tensors: Tensors) -> Sequence[Tensors]:
    """Split `tensors` in the order of their file; a part ends before it exceeds PART_BYTES."""
    if size_of(tensors) <= PART_BYTES:
        return [tensors]
    parts: list[Tensors] = [{}]
    held = 0
    for name in sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name)):
        if parts[-1] and held + tensors[name].nbytes > PART_BYTES:
            parts.append({})
            held = 0
        parts[-1][name] = tensors[name]
        held += tensors[name].nbytes
    return parts
