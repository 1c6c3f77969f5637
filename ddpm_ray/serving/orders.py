"""Jobs as they are sent to a process that draws, and their events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.request_errors import RequestError

Kind: TypeAlias = Literal["generation", "edit", "variation"]
ANSWER_FIELDS = ("user", "stream", "partial_images", "response_format")  # not of the images


@dataclass(frozen=True)
class ImageOrder:
    """A job. It has a seed, so that it gives the same images wherever and whenever it runs."""

    kind: Kind
    request: ImageRequest
    settings: Mapping[str, Any]  # fields of SamplingSettings
    image: bytes | None = None  # file
    mask: bytes | None = None

    @property
    def uploads(self) -> int:
        """Bytes of its files."""
        return len(self.image or b"") + len(self.mask or b"")

    def digest(self) -> str:
        """The sha256 of all that the files of the images depend on."""
        fields = {k: v for k, v in asdict(self.request).items() if k not in ANSWER_FIELDS}
        parts = json.dumps([self.kind, fields, self.settings], sort_keys=True)
        files = [hashlib.sha256(file or b"").hexdigest() for file in (self.image, self.mask)]
        return hashlib.sha256("\n".join([parts, *files]).encode()).hexdigest()


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job."""

    place: int  # among the jobs that wait, from 1; 0: it has begun
    seconds_left: float | None
    computed: int  # rows of network calls
    rows: int = 0  # in all; 0: unknown yet
    losses: int = 0  # processes that ran it and were lost


@dataclass(frozen=True)
class Accepted:
    """The job has been planned, and there is room for it."""

    source: str  # URI of the weights, which stays the same when the name of a model moves on
    facts: Mapping[str, Any]  # how the images are drawn
    cost: float  # megapixels of network calls
    progress: JobProgress


@dataclass(frozen=True)
class Unaffordable:
    """The job was refused: it costs more than the client may spend now."""

    cost: float  # megapixels of network calls


@dataclass(frozen=True)
class PreviewFiles:
    """Estimates of the images of a job, as PNG."""

    number: int
    files: tuple[bytes, ...]


@dataclass(frozen=True)
class Finished:
    """The images of a job, as files."""

    files: tuple[bytes, ...]
    computed: int  # rows of network calls


@dataclass(frozen=True)
class Failed:
    """The job has ended without images."""

    error: RequestError


Event: TypeAlias = Accepted | Unaffordable | JobProgress | PreviewFiles | Finished | Failed


class ReplicaLostError(Exception):
    """The process that ran a job has ended, or cannot be reached; the job may run elsewhere."""


class Draw(Protocol):
    """Runs an order; raises ReplicaLostError. Closing the generator ends the job."""

    def __call__(
        self, order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of the job, the last of which is Finished, Failed or Unaffordable.

        `source` is that of an earlier Accepted; empty: the model that the name means now. `table`
        is the identity of the job table: jobs of an earlier one are given up.
        """
        ...
