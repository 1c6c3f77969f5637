"""Options of the job average: the search for the best EMA width of a run."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.ema_widths import wrong_widths
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.option_fields import option, shown
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.text import MOVED_TEXT_MODEL


@dataclass(frozen=True)
class AverageConfig:
    """The EMA widths to compare, of one run."""

    widths: tuple[float, ...] = option(
        (0.03, 0.05, 0.075, 0.1, 0.15, 0.2), "relative EMA widths (sigma_rel) to score"
    )
    step: int = option(0, "training step of the EMA snapshot; 0: the last", at_least=0)
    data_url: str = option("", "folder or URL of the reference shards; empty: the training data")
    autoencoder: str = option("", MOVED_AUTOENCODER)
    text_model: str = option("", MOVED_TEXT_MODEL)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(num_images=10_000)
    )
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self) -> Iterator[str]:
        """Yield a line for invalid widths, and the problems of evaluation."""
        if self.evaluation.num_images < 2:
            yield (
                f"evaluation.num_images is {self.evaluation.num_images}; widths are compared by "
                f"samples: score at least 2"
            )
        for key in ("bits_per_dim_images", "likelihood_images", "memorisation_images"):
            if value := getattr(self.evaluation, key):
                yield (
                    f"evaluation.{key} is {value}; widths are compared by their Frechet distance "
                    f"alone: set it to 0"
                )
        if encoder := self.evaluation.alignment_encoder:
            yield (
                f"evaluation.alignment_encoder is {shown(encoder)}; widths are compared by their "
                f"Frechet distance alone: leave it out"
            )
        if not self.widths:
            yield "widths is empty; name at least one, as in widths=[0.05,0.1]"
        yield from wrong_widths("widths", self.widths)
        yield from self.evaluation.problems()

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of the complete `sampling` group."""
        yield from self.sampling.problems("sampling")
