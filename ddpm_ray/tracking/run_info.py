"""Plain descriptions of an MLflow run: sent between processes, without importing MLflow."""

from dataclasses import dataclass, field
from typing import Any

MAX_METRICS = 1000  # limit of the server for one call

MetricRow = tuple[str, float, int]  # key, value, step


@dataclass(frozen=True)
class RunMetadata:
    """Facts needed to find or create the MLflow run of a training run."""

    uri: str
    experiment: str
    name: str
    identity: str
    artifacts: str | None  # artifact root of a new experiment; None: the server's default
    parent: str  # id of its parent run; may be empty
    params: dict[str, Any]
    tags: dict[str, str]
    config_yaml: str
    dataset_url: str
    dataset_fingerprint: str
    owner: str = ""  # the driver that opens it; only the newest owner may end a run
    description: str = ""  # Markdown
    begun_step: int = 0  # step of the newest checkpoint that the driver found


@dataclass(frozen=True)
class TrackedRun:
    """The MLflow run that rows are sent to; plain values, sent to the workers."""

    uri: str
    run_id: str
    experiment_id: str
    start_ms: int
    owner: str = field(default="", compare=False)  # as in RunMetadata; empty: any driver
    is_new: bool = field(default=False, compare=False)  # created now, not found

    @property
    def page(self) -> str:
        """The path of the run's page below the MLflow UI's root."""
        return f"/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics"
