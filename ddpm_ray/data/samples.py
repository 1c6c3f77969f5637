"""Samples of a data source in a fixed order, and a summary of its other contents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

EXAMPLES = 5  # names in a group


class Sample(NamedTuple):
    """One image of a source."""

    key: str
    label: int  # -1: none
    image: npt.NDArray[np.uint8] | bytes | None  # [H, W, C]; a file; one too large to be read
    place: str  # for messages


@dataclass(frozen=True)
class NamedGroup:
    """Count of items of one kind, and the names of the first few."""

    kind: str
    count: int
    examples: tuple[str, ...]  # the first EXAMPLES by name

    @classmethod
    def of(cls, kind: str, names: Iterable[str]) -> NamedGroup:
        """The group of all `names`."""
        ordered = sorted(names)
        return cls(kind, len(ordered), tuple(ordered[:EXAMPLES]))

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> NamedGroup:
        """The group that `dataclasses.asdict` gave."""
        return cls(held["kind"], held["count"], tuple(held["examples"]))

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.kind}: {self.count} ({', '.join(self.examples)}{more})"


class Source(Protocol):
    """Samples in an order that depends only on the source."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def left_out(self) -> tuple[NamedGroup, ...]:
        """Contents of the source that are not packed."""
        ...

    @property
    def digest(self) -> str:
        """Names the samples: changes if a key, a label, a file's size or a pixel array does."""
        ...

    @property
    def version(self) -> str:
        """Names the state of the files: changes with the time or the ETag of any, too."""
        ...

    def __len__(self) -> int: ...

    def read(self, samples: range) -> Iterator[Sample]: ...


def groups(named: Iterable[tuple[str, Iterable[str]]]) -> tuple[NamedGroup, ...]:
    """A group for each kind that has names."""
    found = (NamedGroup.of(kind, names) for kind, names in named)
    return tuple(group for group in found if group.count)


def printable_name(name: str) -> str:
    """A name as it can be stored: bytes of it that are no UTF-8 are spelt out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
