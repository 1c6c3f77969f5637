"""Options of the job doctor: the services to check."""

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class DoctorConfig:
    """The services to check."""

    storage: str = option(
        "runs", "folder or fsspec URL for runs; checked by writing a small object"
    )
    tracking_uri: str = option(
        "", "MLflow server or database; empty: $MLFLOW_TRACKING_URI or ./mlflow.db"
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    timeout_s: float = option(12, "timeout of each check in seconds", at_least=1, at_most=600)

    def problems(self) -> Iterator[str]:
        """Yield a line if storage is empty."""
        if not self.storage:
            yield "storage is empty; give it a value, as in storage=s3://bucket/runs"
