"""Options of the job evaluate: the data, the scores, and how images are drawn for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.option_fields import group, option
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.text import MOVED_TEXT_MODEL


@dataclass(frozen=True)
class EvaluateConfig:
    """The data that a trained model is scored against."""

    data_url: str = option("", "folder or URL of the reference shards; empty: the training data")
    autoencoder: str = option("", MOVED_AUTOENCODER)
    text_model: str = option("", MOVED_TEXT_MODEL)
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
        if wanted.where != "workers":
            yield (
                f"evaluation.where is {wanted.where}, which is for scores during training: leave "
                f"it out"
            )
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
