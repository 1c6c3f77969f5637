"""Weights and results of evaluations by a spare process (spare_evaluations.py).

    <run>/evaluations/step-00000500/
        ema.safetensors         the EMA weights of the step
        manifest.json           their size and sha256, written after them
        samples.png             pictures, named by their keys
        result.json             metric rows, documents and scores, written after the pictures

A folder is deleted once a checkpoint is committed that no longer lists its evaluation. A result is
bound to the sha256 of the weights, so one of other weights of the same step is never taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddpm_ray.reporting import Row, Sink
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.checksummed_json import ChecksumError
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import MANIFEST, TENSORS
from ddpm_ray.training.checkpoint_pointers import PREFIX
from ddpm_ray.training.ema_snapshots import SnapshotStore
from ddpm_ray.training.optimizer_moments import Tensors

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

EVALUATIONS = "evaluations"  # below a run's folder
GROUP = "ema"
RESULT = "result.json"


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


class EvaluationStore(SnapshotStore):
    """The evaluations below `url`: weights of a step, and what its evaluation found."""

    def save_weights(self, step: int, weights: Tensors) -> None:
        """Write the EMA weights of `step`. Raises StorageError."""
        self.save(step, {GROUP: weights})

    def weights(self, step: int) -> Tensors:
        """Read and verify the EMA weights of `step`. Raises CheckpointError and StorageError."""
        return self.read(step, GROUP)

    def digest(self, step: int, settings: Mapping[str, Any]) -> str:
        """sha256 of all that the result depends on: the weights of `step`, and JSON settings.

        Raises StorageError.
        """
        manifest = checksummed_json.read(self._file(step, MANIFEST))
        weights = manifest["files"][f"{GROUP}{TENSORS}"]["sha256"]
        text = json.dumps([step, weights, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def save_result(self, step: int, digest: str, result: EvaluationResult) -> None:
        """Write what the evaluation of `step` found. Raises StorageError."""
        for key, _, image in result.images:
            png = io.BytesIO()
            image.save(png, format="PNG")
            object_store.write_bytes(self._file(step, f"{key}.png"), png.getvalue())
        value = {
            "digest": digest,
            "rows": [vars(row) for row in result.metric_rows],
            "images": [[key, at] for key, at, _ in result.images],
            "documents": result.documents,
            "scores": result.scores,
        }
        checksummed_json.write(self._file(step, RESULT), value)

    def has_result(self, step: int, digest: str) -> bool:
        """Whether the result of `step` is there and depends on what `digest` was made of."""
        if not object_store.exists(self._file(step, RESULT)):
            return False
        try:
            return bool(checksummed_json.read(self._file(step, RESULT))["digest"] == digest)
        except (ChecksumError, KeyError, TypeError):
            return False

    def result(self, step: int) -> EvaluationResult:
        """Read what the evaluation of `step` found. Raises StorageError."""
        from PIL import Image  # so that training does not need Pillow

        value = checksummed_json.read(self._file(step, RESULT))
        images = list[tuple[str, int, Image.Image]]()
        for key, at in value["images"]:
            image = Image.open(io.BytesIO(object_store.read_bytes(self._file(step, f"{key}.png"))))
            image.load()
            images.append((key, at, image))
        documents = [(path, content) for path, content in value["documents"]]
        rows = [Row(**row) for row in value["rows"]]
        return EvaluationResult(rows, images, documents, value["scores"])

    def delete(self, step: int) -> None:
        """Delete the folder of `step`, best effort: one that remains only takes space."""
        try:
            object_store.delete_folder(self._folder(step))
        except StorageError as error:
            log.warning("the folder of a finished evaluation stays: %s", error)

    def delete_finished(self, newest_step: int, outstanding: set[int]) -> None:
        """Delete the folders of steps up to `newest_step` that are not outstanding.

        An earlier process ended before it deleted them. Later steps are taken again, and their
        results found.
        """
        for name in object_store.folders(self.url):
            step = int(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else newest_step + 1
            if step <= newest_step and step not in outstanding:
                self.delete(step)

    def _file(self, step: int, name: str) -> str:
        return object_store.join(self._folder(step), name)
