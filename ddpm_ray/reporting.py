"""Reports of a worker: metric rows, progress and documents, and the sink interface for them.

Without torch, which takes 2 s to import and which the control actor does not need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

# Metrics that differ when a step is redone.
STEP_MS = tuple(  # by part, see training/step_clock.py
    f"train/step_ms/{part}"
    for part in ("data", "forward", "backward", "communication", "optimizer", "other")
)
TFLOPS, MFU, PEAK_MEMORY = "train/tflops", "train/mfu", "train/peak_memory_gb"
RATES = (
    "train/images_per_s",
    "train/data_wait_share",
    "train/core_seconds",
    *STEP_MS,
    TFLOPS,
    MFU,
    PEAK_MEMORY,
)


@dataclass(frozen=True)
class Row:
    """Metrics of one optimiser step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """Progress of a run, for display."""

    step: int
    steps: int
    loss: float
    images_per_s: float
    validation_losses: list[dict[str, Any]] = field(
        default_factory=list
    )  # see training/validation_loss.py
    checkpoint: str = ""  # URL of the newest committed one
    core_seconds: float = 0.0  # of its steps, see training.core_seconds


class Command(IntEnum):
    """Command of a driver to its workers; they obey at their next report."""

    NONE = 0
    CHECKPOINT = 1  # commit a checkpoint and continue
    STOP = 2  # commit a checkpoint and return


class Sink(Protocol):
    """Destination of the main worker's rows, images and documents; calls must not block."""

    def rows(self, rows: list[Row]) -> None:
        """Queue rows of metrics."""
        ...

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Queue an image of `step`."""
        ...

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Queue a JSON document for `path` in the run's artifacts."""
        ...

    def unsent(self) -> list[Row]:
        """Return the rows that are not acknowledged yet; the next checkpoint stores them."""
        ...

    def close(self, patience_s: float) -> int:
        """Send what is left for at most `patience_s`; return the number of undelivered rows."""
        ...
