"""What a worker tells: rows of metrics, progress, and the sink that takes them. Without torch.

Torch takes 2 s to import, which the actor between driver and workers has no other use for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

RATES = ("train/images_per_s", "train/data_wait_share")  # the keys that a replay does not repeat


@dataclass(frozen=True)
class Row:
    """Metrics of one optimiser step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a person who watches."""

    step: int
    steps: int
    loss: float
    images_per_s: float
    probes: list[dict[str, Any]] = field(default_factory=list)  # see training/validation_loss.py
    checkpoint: str = ""  # URL of the newest that is committed


class Wish(IntEnum):
    """What a driver asks of its workers; met at their next report."""

    NOTHING = 0
    SAVE = 1  # commit a checkpoint and go on
    STOP = 2  # commit one and return


class Sink(Protocol):
    """Where the leader's rows, pictures and documents go; must not block the step path."""

    def rows(self, rows: list[Row]) -> None: ...

    def image(self, key: str, step: int, image: Image.Image) -> None: ...

    def document(self, path: str, content: dict[str, Any]) -> None: ...

    def unsent(self) -> list[Row]:
        """Rows that are not safely stored yet: they travel in the next checkpoint."""
        ...

    def close(self, patience_s: float) -> int:
        """How many rows remain undelivered after `patience_s` at most: they are sent on resume."""
        ...
