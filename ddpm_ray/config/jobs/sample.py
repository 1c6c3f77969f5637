"""Options of the job sample: the images to draw, and how."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.option_fields import group, option
from ddpm_ray.config.sampling import MOST_IMAGES, SamplingSettings
from ddpm_ray.config.text import MOVED_TEXT_MODEL


@dataclass(frozen=True)
class SampleConfig:
    """The images to draw from a trained model."""

    num_images: int = option(64, "images to draw", at_least=1, at_most=MOST_IMAGES)
    gif: str = option(
        "", "GIF file of the x_0 estimates, one frame per step; empty: none", formerly="film"
    )
    strip: str = option(
        "",
        "image file that shows the denoising of the first images, step by step: x_t above the "
        "estimate of x_0, noisy latents in the colours of their preview map; empty: none",
    )
    prompts_file: str = option(
        "",
        "text file of prompts, one a line, in place of sampling.prompts; image i has that of "
        "line i + 1, and after the last line the first; empty: none",
    )
    autoencoder: str = option("", MOVED_AUTOENCODER)
    text_model: str = option("", MOVED_TEXT_MODEL)
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
