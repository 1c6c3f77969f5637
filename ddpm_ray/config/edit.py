"""Options of image editing: the kind of edit and its method."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm_ray.config.diffusion import SamplingConfig
from ddpm_ray.config.loading import option

MARGINS = ("top", "bottom", "left", "right")


@dataclass(frozen=True)
class EditConfig:
    """An image edited by a trained model: `jobs/edit.py MODEL_URI IMAGE`."""

    kind: Literal["inpaint", "outpaint", "image_to_image", "enlarge"] = option(
        "inpaint", "repaint where the mask is white; add margins; vary all of it; super-resolution"
    )
    num_images: int = option(1, "variants; more than one are shown as a grid", at_least=1)
    method: Literal["repaint", "replacement"] = option(
        "repaint", "of inpaint and outpaint; replacement: faster, fits the known pixels less"
    )
    resamples: int = option(10, "repaint: times that each jump is sampled", at_least=1)
    jump_length: int = option(10, "repaint: steps per jump", at_least=1)
    strength: float = option(
        0.5, "image_to_image: share of T that is noised and drawn again", above=0, at_most=1
    )
    top: int = option(0, "outpaint: pixels above the image", at_least=0)
    bottom: int = option(0, "outpaint: pixels below it", at_least=0)
    left: int = option(0, "outpaint: pixels on its left", at_least=0)
    right: int = option(0, "outpaint: pixels on its right", at_least=0)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def problems(self) -> Iterator[str]:
        """Margins that do not fit the kind."""
        given = [side for side in MARGINS if getattr(self, side)]
        if self.kind == "outpaint" and not given:
            yield "top is 0, and so are bottom, left and right; outpaint adds pixels: set one"
        if self.kind != "outpaint" and given:
            yield (
                f"{given[0]} is {getattr(self, given[0])} and kind {self.kind!r}, which adds no "
                f"pixels: set kind=outpaint or leave it at 0"
            )

    @property
    def repaints(self) -> bool:
        """Whether RePaint walks, which takes the sampler ancestral if none is named."""
        return self.kind in ("inpaint", "outpaint") and self.method == "repaint"

    def sampling_problems(self) -> Iterator[str]:
        """What the whole of `sampling` rules out, and a walk that RePaint does not know."""
        if self.repaints:
            if self.sampling.sampler not in ("ancestral", "ddim"):
                yield (
                    f"sampling.sampler is {self.sampling.sampler!r}; repaint walks as ancestral or "
                    f"ddim: take one of these, or method=replacement"
                )
            if self.sampling.variance != "fixed_small":
                yield (
                    f"sampling.variance is {self.sampling.variance!r}; repaint walks with "
                    f"fixed_small alone: leave it so, or take method=replacement"
                )
        yield from self.sampling.problems("sampling")

    def argument_errors(self, mask: str, out: str) -> Iterator[str]:
        """What is wrong with the files of a command line, before any is read."""
        if self.kind == "inpaint" and not mask:
            yield (
                "--mask is left out and kind is 'inpaint', which paints where a mask is white: "
                "give one, or set kind=outpaint or kind=image_to_image"
            )
        if self.kind != "inpaint" and mask:
            yield f"--mask is {mask} and kind {self.kind!r}, which reads none: leave it out"
        if not out.lower().endswith(".png"):
            yield f"--out is {out}; edits are saved as PNG, which changes no pixel: end it in .png"
