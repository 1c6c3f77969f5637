"""Writer of one MLflow run's metric rows, pictures and documents.

MLflow's key of a metric row includes its time stamp and value. Time stamps here are a function of
(run start, step), so a step that is replayed after a crash writes the row that is already stored.
Rates depend on the clock and would differ: the first value is kept, later ones are dropped.
"""

import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Run
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from PIL import Image

from ddpm_ray.tracking.errors import answering
from ddpm_ray.tracking.mlflow_client import FILE_S, BoundedClient
from ddpm_ray.tracking.run_info import MetricRow, TrackedRun

# MLflow's page shows metrics and images in sections, by what stands before the last slash (~ in a
# file's name), in alphabetical order: this section comes before `eval` and `train`.
SECTION = "at a glance"
NEWEST = 0  # the step at which MLflow's image panel opens
PREVIEW_PIXELS = 512  # the panel is 250 wide, on some screens of two pixels each


class RunLog:
    """Idempotent writer of one run's rows, pictures and documents. Raises TrackingError."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        with answering(run.uri):
            self._client = BoundedClient(run.uri)
            self._files = BoundedClient(run.uri, FILE_S)

    def newest_steps(self) -> dict[str, int]:
        """Return the newest stored step of each metric, in one call."""
        with answering(self._run.uri):
            found: Run = self._client.get_run(self._run.run_id)
            return {metric.key: int(metric.step) for metric in found.data.to_proto().metrics}

    def rows(self, rows: Iterable[MetricRow]) -> None:
        """Log metric rows, at most MAX_METRICS."""
        start_ms = self._run.start_ms
        metrics = [Metric(key, value, start_ms + step, step) for key, value, step in rows]
        with answering(self._run.uri):
            self._client.log_batch(self._run.run_id, metrics=metrics)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Log an image of `step`, and as the newest; a replayed step overwrites its own files.

        MLflow's panel opens at step 0, which is therefore the newest image, not that of step 0.
        """
        preview = image.copy()
        preview.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
        with tempfile.TemporaryDirectory() as scratch:
            for place in {step, NEWEST}:
                path = Path(scratch) / Path(image_path(self._run, key, place)).name
                image.save(path)
                preview.save(path.with_name(f"{path.stem}+compressed.webp"))
            with answering(self._run.uri):
                self._files.log_artifacts(self._run.run_id, scratch, "images")
                self._files.set_tag(self._run.run_id, MLFLOW_LOGGED_IMAGES, True)

    def has_image(self, key: str) -> bool:
        """Whether the newest image `key` is there."""
        with answering(self._run.uri):
            found = self._client.list_artifacts(self._run.run_id, "images")
            return image_path(self._run, key) in {file.path for file in found}

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Log a JSON file as an artifact of the run."""
        with answering(self._run.uri):
            self._files.log_dict(self._run.run_id, content, path)


def image_path(run: TrackedRun, key: str, step: int = NEWEST) -> str:
    """Return the artifact path of an image, named as MlflowClient.log_image names it."""
    number = uuid.uuid5(uuid.NAMESPACE_OID, f"{run.run_id} {key} {step}")
    return f"images/{SECTION}~{key}+step+{step}+timestamp+{run.start_ms + step}+{number}.png"
