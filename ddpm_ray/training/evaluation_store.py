"""Weights and results of evaluations by a spare process (spare_evaluations.py).

    <run>/evaluations/step-00000500/
        ema.safetensors         the EMA weights of the step
        manifest.json           their size and sha256, written after them
        samples.png             pictures, named by their keys
        result.json             metric rows, documents and scores, written after the pictures

A folder is deleted once a checkpoint is committed that no longer lists its evaluation. A result
holds the sha256 of its pictures and a digest of all that it depends on, so neither a damaged result
nor one of other weights or outputs of the same step is ever used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddpm_ray.reporting import Row, Sink
from ddpm_ray.storage import checksummed, checksummed_json, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.checksummed_json import ChecksumError
from ddpm_ray.storage.errors import MissingObjectError, StorageError
from ddpm_ray.training.checkpoint_pointers import PREFIX
from ddpm_ray.training.ema_snapshots import SnapshotStore
from ddpm_ray.training.optimizer_moments import Tensors

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"  # below a run's folder
GROUP = "ema"
RESULT = "result.json"
FOLDER = re.compile(f"{PREFIX}([0-9]{{8,}})")  # of a step
REMEDY = "evaluate a checkpoint of the step, if one was kept, with jobs/evaluate.py"


class EvaluationResultError(StorageError):
    """A stored result that must not be used; args are (url, reason, remedy).

    As for other errors of storage, the evaluation is tried again, which stores another one.
    """


@dataclass
class EvaluationResult:
    """A Sink that keeps what an evaluation passes to it, to be passed on by another process."""

    metric_rows: list[Row] = field(default_factory=list)
    images: list[tuple[str, int, Image.Image]] = field(default_factory=list)
    documents: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)  # as in TrainingState; empty: none

    def rows(self, rows: list[Row]) -> None:
        """Keep rows of metrics."""
        self.metric_rows += rows

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Keep an image of `step`."""
        self.images.append((key, step, image))

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Keep a JSON document."""
        self.documents.append((path, content))

    def unsent(self) -> list[Row]:
        """Return no rows: whoever passes them on stores them."""
        return []

    def close(self, patience_s: float) -> int:
        """Do nothing."""
        return 0

    def clear(self) -> None:
        """Keep nothing, for the next evaluation."""
        for kept in (self.metric_rows, self.images, self.documents):
            kept.clear()
        self.scores = {}

    def pass_on(self, sink: Sink) -> None:
        """Pass everything to the sink of the run."""
        sink.rows(self.metric_rows)
        for image in self.images:
            sink.image(*image)
        for document in self.documents:
            sink.document(*document)


@dataclass(frozen=True)
class EvaluationStore(SnapshotStore):
    """The evaluations below `url`: weights of a step, and what its evaluation found."""

    remedy: str = REMEDY

    def save_weights(self, step: int, weights: Tensors) -> None:
        """Write the EMA weights of `step`. Raises StorageError."""
        self.save(step, {GROUP: weights})

    def weights(self, step: int) -> Tensors:
        """Read and verify the EMA weights of `step`. Raises CheckpointError and StorageError."""
        return self.read(step, GROUP)

    def digest(self, step: int, settings: Mapping[str, Any]) -> str:
        """sha256 of all that the result depends on: the weights of `step`, and JSON settings.

        Raises CheckpointError if there are no weights, and StorageError.
        """
        text = json.dumps([step, self.sha256(step, GROUP), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save_result(self, step: int, digest: str, result: EvaluationResult) -> None:
        """Write what the evaluation of `step` found. Raises StorageError."""
        images = list[tuple[str, int, str]]()
        for key, at, image in result.images:
            png = io.BytesIO()
            image.save(png, format="PNG")
            object_store.write_bytes(self._file(step, f"{key}.png"), png.getvalue())
            images.append((key, at, hashlib.sha256(png.getvalue()).hexdigest()))
        value = {
            "digest": digest,
            "rows": [vars(row) for row in result.metric_rows],
            "images": images,
            "documents": result.documents,
            "scores": result.scores,
        }
        checksummed_json.write(self._file(step, RESULT), value)

    def has_result(self, step: int, digest: str) -> bool:
        """Whether a complete result of `step` with this digest can be read."""
        try:
            self.result(step, digest)
        except StorageError:  # in an outage it is made again, or the weights cannot be read either
            return False
        return True

    def result(self, step: int, digest: str) -> EvaluationResult:
        """Read and verify what the evaluation of `step` with this digest found.

        Raises EvaluationResultError if it is damaged or of another evaluation, and StorageError.
        """
        where = self._file(step, RESULT)
        try:
            value = checksummed_json.read(where)
            if value["digest"] != digest:
                reason = "is the result of other weights, settings or outputs"
                raise EvaluationResultError(where, reason, REMEDY)
            images = [(key, at, self._image(step, key, sha)) for key, at, sha in value["images"]]
            documents = [(path, content) for path, content in value["documents"]]
            rows = [Row(**row) for row in value["rows"]]
            return EvaluationResult(rows, images, documents, value["scores"])
        except (ChecksumError, DamagedError, MissingObjectError) as error:
            reason = "is missing" if isinstance(error, MissingObjectError) else "is damaged"
            raise EvaluationResultError(error.args[0], reason, REMEDY) from error
        except (KeyError, TypeError, ValueError) as error:  # as those without sha256 of pictures
            raise EvaluationResultError(where, "is of another version", REMEDY) from error

    def _image(self, step: int, key: str, sha256: str) -> Image.Image:
        from PIL import Image  # so that training does not need Pillow

        png = checksummed.read_verified(self._file(step, f"{key}.png"), sha256)
        image = Image.open(io.BytesIO(png))
        image.load()
        return image

    def delete(self, step: int) -> None:
        """Delete the folder of `step`, best effort: one that remains only takes space."""
        try:
            object_store.delete_folder(self._folder(step))
        except StorageError as error:
            log.warning("the folder of a finished evaluation stays: %s", error)

    def delete_finished(self, outstanding: set[int], newest_step: float = math.inf) -> None:
        """Delete the folders of steps up to `newest_step` that are not outstanding, best effort.

        An earlier process ended before it deleted them. Folders of other names stay.
        """
        try:
            names = object_store.folders(self.url)
        except StorageError as error:
            log.warning("folders of finished evaluations may stay: %s", error)
            return
        for match in filter(None, map(FOLDER.fullmatch, names)):
            step = int(match[1])
            if step <= newest_step and step not in outstanding:
                self.delete(step)
