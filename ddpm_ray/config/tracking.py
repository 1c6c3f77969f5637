"""Options of tracking in MLflow."""

from dataclasses import dataclass

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow: where the run is logged, and how often."""

    uri: str = option(
        "", "MLflow server or database file; empty: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db"
    )
    experiment: str = option("ddpm-ray", "MLflow experiment that holds the run")
    every_steps: int = option(
        1, "steps averaged into one logged row of loss, gradient norm and learning rate", at_least=1
    )
    peak_tflops: float = option(
        0.0,
        "peak of a worker's device in TFLOP/s, for train/mfu; 0: that of known GPUs in bf16",
        at_least=0,
    )
    flush_every_s: float = option(2.0, "seconds between uploads of rows", above=0)
    last_rows_s: float = option(
        60,
        "seconds to wait for MLflow at the end; a continued run sends undelivered rows",
        above=0,
    )
