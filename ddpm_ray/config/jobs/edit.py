"""Options of image editing: the kind of edit and its method."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ddpm_ray.config.caption_rule import CaptionError, cleaned
from ddpm_ray.config.data import MOVED_AUTOENCODER
from ddpm_ray.config.option_fields import option, shown
from ddpm_ray.config.sampling import MOST_IMAGES, SamplingSettings
from ddpm_ray.config.text import MOVED_TEXT_MODEL

EditKind: TypeAlias = Literal[
    "inpaint", "outpaint", "image_to_image", "enlarge", "text_diff", "variations"
]
InpaintingMethod: TypeAlias = Literal["auto", "conditioned", "repaint", "replacement"]
MARGINS = ("top", "bottom", "left", "right")
MOST_MARGIN = 65_535  # pixels, the longest side of a JPEG file


def inpainting_method(method: InpaintingMethod, *, conditioned: bool) -> InpaintingMethod:
    """The method that `auto` stands for, for a model trained with inpainting masks or without.

    Raises ValueError for `conditioned` and a model that was trained without.
    """
    if method == "conditioned" and not conditioned:
        raise ValueError(
            "method is 'conditioned', but the model was trained without objective.inpainting_masks "
            "and cannot see known pixels: use method=repaint"
        )
    if method != "auto":
        return method
    return "conditioned" if conditioned else "repaint"


@dataclass(frozen=True)
class EditConfig:
    """One edit of an image by a trained model."""

    kind: EditKind = option(
        "inpaint",
        "repaint where the mask is white; extend the image; vary the whole image; super-resolution;"
        " change it from from_text to to_text; draw images like it, by a model that is given the "
        "embedding of an image",
    )
    num_images: int = option(
        1, "variants to draw; several are saved as one grid", at_least=1, at_most=MOST_IMAGES
    )
    method: InpaintingMethod = option(
        "auto",
        "inpaint, outpaint: how; conditioned: for models trained with objective.inpainting_masks; "
        "repaint: for any model; replacement: faster, less consistent; auto: conditioned if the "
        "model supports it, else repaint",
    )
    resamples: int = option(10, "repaint: resamplings of each jump", at_least=1)
    jump_length: int = option(10, "repaint: length of a jump in steps", at_least=1)
    strength: float = option(
        0.5, "image_to_image: fraction of T to noise and denoise again", above=0, at_most=1
    )
    top: int = option(0, "outpaint: pixels above the image", at_least=0, at_most=MOST_MARGIN)
    bottom: int = option(0, "outpaint: pixels below it", at_least=0, at_most=MOST_MARGIN)
    left: int = option(0, "outpaint: pixels on its left", at_least=0, at_most=MOST_MARGIN)
    right: int = option(0, "outpaint: pixels on its right", at_least=0, at_most=MOST_MARGIN)
    from_text: str = option("", "text_diff: text that describes the image; empty: no text")
    to_text: str = option("", "text_diff: text that describes the image after the edit")
    iterations: int = option(
        1, "text_diff: network calls for each step of the inversion; more: closer", at_least=1
    )
    prompts_file: str = option(
        "",
        "text file of prompts, one a line, in place of sampling.prompts; variant i has that of "
        "line i + 1, and after the last line the first; empty: none",
    )
    autoencoder: str = option("", MOVED_AUTOENCODER)
    text_model: str = option("", MOVED_TEXT_MODEL)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def problems(self) -> Iterator[str]:
        """Yield a line for margins and texts that do not fit the kind."""
        yield from self._text_problems()
        given = [side for side in MARGINS if getattr(self, side)]
        if self.kind == "outpaint" and not given:
            yield "top is 0, and so are bottom, left and right; outpaint adds pixels: set one"
        if self.kind != "outpaint" and given:
            yield (
                f"{given[0]} is {getattr(self, given[0])} and kind is {self.kind!r}, which adds no "
                f"pixels: set kind=outpaint or leave it at 0"
            )

    def _text_problems(self) -> Iterator[str]:
        """Yield a line for texts of another kind of edit, and for text_diff without them."""
        for key, text in (("from_text", self.from_text), ("to_text", self.to_text)):
            try:
                cleaned(text, "the text")
            except CaptionError as error:
                yield f"{key} cannot be used: {error}"
            if text and self.kind != "text_diff":
                yield (
                    f"{key} is {shown(text)} and kind is {self.kind!r}, whose texts are "
                    f"sampling.prompts: set kind=text_diff or leave it out"
                )
        if self.kind != "text_diff":
            return
        if not self.to_text:
            yield "to_text is empty, and kind is 'text_diff': describe the image after the edit"
        if self.num_images != 1:
            yield (
                f"num_images is {self.num_images}; text_diff adds no noise, so that all variants "
                f"are equal: leave it at 1"
            )
        if self.prompts_file:
            yield (
                f"prompts_file is {self.prompts_file} and kind is 'text_diff', whose texts are "
                f"from_text and to_text: leave it out"
            )

    def for_model(self, *, conditioned: bool) -> "EditConfig":
        """This edit with the method that `auto` stands for; see `inpainting_method`. ValueError."""
        if self.kind not in ("inpaint", "outpaint"):
            return self
        return replace(self, method=inpainting_method(self.method, conditioned=conditioned))

    @property
    def repaints(self) -> bool:
        """Whether RePaint is used, whose default sampler is ancestral; ask after `for_model`."""
        return self.kind in ("inpaint", "outpaint") and self.method == "repaint"

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of `sampling`, and a line for a sampler that RePaint lacks."""
        if self.repaints:
            if self.sampling.sampler not in ("ancestral", "ddim"):
                yield (
                    f"sampling.sampler is {self.sampling.sampler!r}; repaint needs ancestral "
                    f"or ddim: use one of these, or method=replacement"
                )
            if self.sampling.variance != "fixed_small":
                yield (
                    f"sampling.variance is {self.sampling.variance!r}; repaint needs "
                    f"fixed_small: use it, or method=replacement"
                )
        yield from self.sampling.problems("sampling")

    def argument_errors(self, mask: str, out: str) -> Iterator[str]:
        """Yield a line for each wrong file argument, before any file is read."""
        if self.kind == "inpaint" and not mask:
            yield (
                "--mask is missing and kind is 'inpaint', which repaints where the mask is white: "
                "give a mask, or set kind=outpaint or kind=image_to_image"
            )
        if self.kind != "inpaint" and mask:
            yield f"--mask is {mask} and kind is {self.kind!r}, which uses no mask: leave it out"
        if not out.lower().endswith(".png"):
            yield f"--out is {out}; edits are saved as PNG, which is lossless: end it in .png"
