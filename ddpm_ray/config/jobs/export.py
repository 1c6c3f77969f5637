"""Options of the job export: how a model for another library samples."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.text import MOVED_TEXT_MODEL


@dataclass(frozen=True)
class ExportConfig:
    """A trained model for another library."""

    autoencoder: str = option("", MOVED_AUTOENCODER)
    text_model: str = option("", MOVED_TEXT_MODEL)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def problems(self) -> Iterator[str]:
        """Yield nothing: sampling is checked after the run's own settings are read."""
        yield from ()

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of `sampling`; variance and clip are written to the scheduler."""
        yield from self.sampling.problems("sampling")
