"""The images of a request while they are drawn: previews, then files."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.serving.engine_task import EngineJob
from ddpm_ray.serving.image_files import FileFormat, encoded_image
from ddpm_ray.serving.orders import JobProgress


@dataclass(frozen=True)
class Preview:
    """An estimate of the images while they are drawn."""

    number: int  # 0, 1, ... of the previews of its request
    images: Images  # uint8 [n, h, w, C]


class ImageJob:
    """The images of a request: previews as they come, then the files."""

    def __init__(
        self,
        job: EngineJob[Images],
        rows: int,
        facts: dict[str, Any],
        made: queue.SimpleQueue[Preview | None],
    ) -> None:
        self.job, self.rows, self.facts, self._made = job, rows, facts, made
        job.when_done(lambda: made.put(None))

    def progress(self) -> JobProgress:
        """The progress of its network calls."""
        return JobProgress(self.job.place, self.job.seconds_left, self.job.computed, self.rows)

    def previews(self) -> Iterator[Preview]:
        """Yield previews until the images are there or the job has failed; read them once."""
        while (preview := self._made.get()) is not None:
            yield preview

    def files(self, output_format: FileFormat, timeout_s: float | None = None) -> list[bytes]:
        """Wait for the images and encode them; each has the facts of its drawing inside, if PNG.

        Raises what the job raised, as JobCancelledError, and TimeoutError.
        """
        images = self.job.result(timeout_s)
        return [
            encoded_image(image, output_format, self.facts | {"index": index})
            for index, image in enumerate(images)
        ]

    def cancel(self) -> None:
        """End the job before its next step."""
        self.job.cancel()


class Previewer:
    """Puts `count` estimates of the images, of evenly spaced steps from the first on, in `made`."""

    def __init__(
        self, model: DrawingModel, count: int, steps: int, made: queue.SimpleQueue[Preview | None]
    ) -> None:
        self._model, self._made, self._seen = model, made, 0
        self._due: dict[int, int] = {}
        count = min(count, steps)
        for number in range(count):
            self._due[number * steps // count] = number

    def __call__(self, t: int, x_t: Tensor, x_0: Tensor) -> None:
        """Show the estimate x_0 if it is due."""
        number = self._due.get(self._seen)
        self._seen += 1
        if number is not None:
            self._made.put(Preview(number, self._model.preview(x_0)))
