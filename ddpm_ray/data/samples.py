"""Samples of a data source in a fixed order, and a summary of its other contents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAX_EXAMPLES = 5  # names stored per group


class Sample(NamedTuple):
    """One image of a source with its label."""

    key: str
    label: int  # -1: none
    image: npt.NDArray[np.uint8] | bytes | None  # [H, W, C]; a file; None: file too large
    location: str  # for error messages
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedGroup:
    """Count of items of one kind, with the names of the first few."""

    kind: str
    count: int
    examples: tuple[str, ...]  # the first MAX_EXAMPLES by name

    @classmethod
    def of(cls, kind: str, names: Iterable[str]) -> NamedGroup:
        """Summarize `names`."""
        ordered = sorted(names)
        return cls(kind, len(ordered), tuple(ordered[:MAX_EXAMPLES]))

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> NamedGroup:
        """Inverse of `dataclasses.asdict`."""
        return cls(held["kind"], held["count"], tuple(held["examples"]))

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.kind}: {self.count} ({', '.join(self.examples)}{more})"


class Source(Protocol):
    """Samples in an order that depends only on the source."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each label, by number; empty without names."""
        ...

    @property
    def captions(self) -> pa.LargeListArray | None:
        """Captions of each sample; None: a source without captions."""
        ...

    @property
    def left_out(self) -> tuple[NamedGroup, ...]:
        """Contents of the source that are not packed."""
        ...

    @property
    def digest(self) -> str:
        """Hash of keys, labels, captions, file sizes and pixel arrays: identifies the samples."""
        ...

    @property
    def version(self) -> str:
        """Hash that also changes with the modification time or ETag of any file."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: range) -> Iterator[Sample]:
        """Yield the samples of these positions, in order."""
        ...


def named_groups(named: Iterable[tuple[str, Iterable[str]]]) -> tuple[NamedGroup, ...]:
    """Return one group for each kind that has names."""
    found = (NamedGroup.of(kind, names) for kind, names in named)
    return tuple(group for group in found if group.count)


def printable_name(name: str) -> str:
    """Return a name that can be stored as UTF-8: other bytes are written as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
