"""Options of the jobs on a trained model: sample, export, evaluate and doctor."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.option_fields import group, option
from ddpm_ray.config.sampling import SamplingSettings


@dataclass(frozen=True)
class SampleConfig:
    """The images to draw from a trained model."""

    num_images: int = option(64, "images to draw", at_least=1)
    gif: str = option(
        "", "GIF file of the x_0 estimates, one frame per step; empty: none", formerly="film"
    )
    autoencoder: str = option("", MOVED_AUTOENCODER)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    guidance: GuidanceConfig = group(GuidanceConfig, formerly="lead")

    def problems(self) -> Iterator[str]:
        """Yield a line for a wrong file name; sampling is checked after the run's own is read."""
        if self.gif and not self.gif.lower().endswith(".gif"):
            yield f"gif is {self.gif!r}; end it in .gif, as {self.gif}.gif"

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of the complete `sampling` group."""
        yield from self.sampling.problems("sampling")
        yield from self.guidance.problems(self.sampling)


@dataclass(frozen=True)
class ExportConfig:
    """A trained model for another library."""

    autoencoder: str = option("", MOVED_AUTOENCODER)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def problems(self) -> Iterator[str]:
        """Yield nothing: sampling is checked after the run's own settings are read."""
        yield from ()

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of `sampling`; variance and clip are written to the scheduler."""
        yield from self.sampling.problems("sampling")


@dataclass(frozen=True)
class EvaluateConfig:
    """The data that a trained model is scored against."""

    data_url: str = option("", "folder or URL of the reference shards; empty: the training data")
    autoencoder: str = option("", MOVED_AUTOENCODER)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    guidance: GuidanceConfig = group(GuidanceConfig, formerly="lead")
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(num_images=10_000)
    )
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self) -> Iterator[str]:
        """Yield the problems of evaluation, and a line if nothing is to be scored."""
        yield from self.evaluation.problems()
        wanted = self.evaluation
        others = (wanted.bits_per_dim_images, wanted.likelihood_images, wanted.memorisation_images)
        if wanted.num_images < 2 and not any(others):
            yield (
                f"evaluation.num_images is {wanted.num_images}; score at least 2, or set one of "
                f"bits_per_dim_images, likelihood_images, memorisation_images"
            )

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of the complete `sampling` group."""
        yield from self.sampling.problems("sampling")
        yield from self.guidance.problems(self.sampling)


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
