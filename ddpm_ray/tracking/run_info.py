"""What a run's place in MLflow is, in plain values: they travel, and cost no import of MLflow."""

from dataclasses import dataclass, field
from typing import Any

MAX_METRICS = 1000  # that the server takes in one call

MetricRow = tuple[str, float, int]  # key, value, step


@dataclass(frozen=True)
class RunCard:
    """All that MLflow is told of a run: enough to find it, or to make it, at any time."""

    uri: str
    experiment: str
    name: str
    identity: str
    artifacts: str | None  # where a new experiment keeps its files; None: the server knows
    parent: str  # id of the run that the UI shows it under; may be empty
    params: dict[str, Any]
    tags: dict[str, str]
    config_yaml: str
    dataset_url: str
    dataset_fingerprint: str
    owner: str = ""  # the driver that opens it: only its newest owner may end a run
    begun_step: int = 0  # of the newest checkpoint, where the driver found one


@dataclass(frozen=True)
class TrackedRun:
    """Where a run's rows go; small and plain, so that it travels to the workers."""

    uri: str
    run_id: str
    experiment_id: str
    start_ms: int
    owner: str = field(default="", compare=False)  # as in RunCard; empty: whoever asks
    is_new: bool = field(default=False, compare=False)  # made now, not found

    @property
    def page(self) -> str:
        """The run's address below the MLflow UI's root."""
        return f"/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics"
