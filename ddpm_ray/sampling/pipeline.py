"""The notebook interface to a trained model: edits of uint8 images, with checked arguments."""

from dataclasses import replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.config.jobs.edit import MOST_MARGIN, InpaintingMethod
from ddpm_ray.config.option_fields import checks_arguments, limits
from ddpm_ray.config.sampling import MOST_IMAGES, SamplingSettings
from ddpm_ray.data.low_resolution import enlarged
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import canvas, editing
from ddpm_ray.sampling.array_arguments import as_images, as_low_resolution, as_mask, require_text
from ddpm_ray.sampling.drawing_model import (
    Count,
    DrawingModel,
    Index,
    embedded,
    in_turn,
    require_callable,
)
from ddpm_ray.sampling.editing import Edit, Mask, Painting
from ddpm_ray.sampling.sampling import Images

Margin: TypeAlias = Annotated[int, limits(at_least=0, at_most=MOST_MARGIN)]  # pixels
Share: TypeAlias = Annotated[float, limits(above=0, at_most=1)]


class TrainedModel(DrawingModel):
    """A trained model that draws and edits images; returned by `ddpm_ray.load`.

    `DrawingModel` describes the settings that every method takes.

    A model of latents also takes and returns pixels, through its autoencoder. Known pixels are
    returned unchanged; a latent counts as known if all its pixels are.

    Images to edit are uint8 arrays, torch tensors, or lists of these or of PIL images. Large images
    are denoised in windows of the model's size that overlap by half.
    """

    @checks_arguments
    def inpaint(
        self,
        images: Images,
        mask: Mask,
        *,
        method: InpaintingMethod = "auto",
        resamples: Count = 10,
        jump_length: Count = 10,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Images:
        """Repaint the pixels of `images` where `mask` is False; returns uint8 [N, H, W, C].

        `mask` [H, W] or [N, H, W] is True (or 1) where a pixel is known; known pixels are returned
        unchanged, and what `images` hold elsewhere has no effect. diffusers and image editors use
        the opposite convention: invert with ~.

        With `conditioned`, the network sees the known pixels in each step; `auto` chooses it for
        models trained with `objective.inpainting_masks`, and `repaint` for others.

        `repaint` (Lugmayr et al. 2022, arXiv:2201.09865) repeats each section of `jump_length`
        steps `resamples` times to make the result consistent with the known pixels, which takes
        about `resamples` times the network calls of `replacement`. By default it uses the run's
        settings with the sampler ancestral and fixed_small.

        `on_step` is that of `sample`: called at each step of each batch, for the whole images.
        """
        require_callable(on_step)
        painting = Painting(method, resamples, jump_length).chosen_for(self.denoiser)
        chosen = self._chosen(settings, repaint=painting.method == "repaint")
        plan, factor = self._plan(chosen), self.denoiser.codec.factor
        known, size = as_images(images, self.image_shape.channels), self._window
        keep = as_mask(mask, known)
        cells = canvas.known_cells(keep, factor).to(self.device)
        whole = canvas.filled(known, keep) if factor > 1 else known

        def edit(x: Tensor, index: Tensor) -> Tensor:
            """Repaint the images `index`, whose x_0 are x."""
            rows = cells if len(cells) == 1 else cells[index]
            return editing.inpaint(
                self.denoiser, plan, painting, x, rows, index, size, on_step=on_step
            )

        painted = self._edited(edit, whole, chosen.batch_size)
        return np.where(keep[:, 0, :, :, None], known, painted)

    @checks_arguments
    def outpaint(
        self,
        images: Images,
        *,
        top: Margin = 0,
        bottom: Margin = 0,
        left: Margin = 0,
        right: Margin = 0,
        **arguments: Any,
    ) -> Images:
        """Extend `images` by margins; returns uint8 [N, top + H + bottom, left + W + right, C].

        `arguments` are those of `inpaint`. The result must be at least as large as the model's
        images.
        """
        known = as_images(images, self.image_shape.channels)
        extended, mask = editing.outpainting_canvas(known, top, bottom, left, right)
        return self.inpaint(extended, mask, **arguments)

    @checks_arguments
    def image_to_image(
        self,
        images: Images,
        strength: Share,
        *,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Images:
        """Vary `images` by SDEdit: add noise up to step `strength` T and denoise from there.

        Returns uint8 [N, H, W, C]. A `strength` near 0 keeps the images, 1 keeps almost nothing of
        them. Takes about strength times `steps` steps. `on_step` is that of `sample`. (Meng et al.
        2022, arXiv:2108.01073.)
        """
        require_callable(on_step)
        chosen = self._chosen(settings)
        plan, size = self._plan(chosen), self._window

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.image_to_image(
                self.denoiser, plan, strength, x, index, size, on_step=on_step
            )

        return self._edited(edit, images, chosen.batch_size)

    @checks_arguments
    def enlarge(self, images: Images, *, first: Index = 0, **settings: Any) -> Images:
        """Upscale `images` [N, h, w, C] to the model's size; returns uint8 [N, H, W, C].

        The noise of image j is that of number first + j.

        For models trained for super-resolution (Saharia et al. 2021, arXiv:2104.07636), such as
        the last stage of a cascade (Ho et al. 2022, arXiv:2106.15282).
        """
        pixels = self.denoiser.takes.low_resolution_pixels
        found = as_low_resolution(images, self.image_shape, pixels)
        small = self.denoiser.codec.encode(torch.from_numpy(found).to(self.device))
        large = in_turn(enlarged(small, self.image_size), first)
        denoiser = replace(self.denoiser, low_resolution_images=large)
        return replace(self, denoiser=denoiser).sample(len(found), first=first, **settings)

    @checks_arguments
    def variations(self, images: Images, *, per_image: Count = 1, **settings: Any) -> Images:
        """Draw `per_image` images like each of `images`: uint8 [N * per_image, H, W, C].

        For models that are given the embedding of an image (embedding.encoder): what the embedding
        keeps of an image stays, and the rest is drawn. There is no text unless the call has
        `prompts`. (Ramesh et al. 2022, "DALL-E 2",
        arXiv:2204.06125, section 3.1.)
        """
        embeddings = embedded(self, images, per_image)
        denoiser = replace(self.denoiser, embeddings=embeddings)
        if settings.get("prompts") is None and denoiser.takes.tokenizer is not None:
            settings["prompts"] = [""]
        return replace(self, denoiser=denoiser).sample(len(embeddings), **settings)

    @checks_arguments
    def interpolate(
        self,
        first: Index,
        last: Index,
        num_images: Annotated[int, limits(at_least=2, at_most=MOST_IMAGES)],
        *,
        label: int | str | None = None,
        **settings: Any,
    ) -> Images:
        """Interpolate between images `first` and `last` of `seed`: uint8 [num_images, H, W, C].

        Their noises are interpolated spherically in equal steps, ends included, and denoised by
        deterministic DDIM, whatever the run's sampler. All images have one `label`, by default
        that of `first`. (Song et al. 2021, arXiv:2010.02502, appendix D.5.)
        """
        if label is not None:
            if settings.get("labels") is not None:
                raise ValueError(
                    "label and labels are given; the images have one label: give label"
                )
            settings["labels"] = label
        chosen = self._deterministic(settings)
        plan, shape, ends = self._plan(chosen), self.image_shape, (first, last)
        shares = torch.linspace(0, 1, num_images, dtype=torch.float64)
        parts = (
            editing.interpolate_samples(self.denoiser, plan, ends, part, shape, self.device)
            for part in torch.split(shares, chosen.batch_size)
        )
        return np.concatenate([self.denoiser.codec.decode(part) for part in parts])

    @checks_arguments
    def reconstruct(self, images: Images, *, iterations: Count = 1, **settings: Any) -> Images:
        """Encode `images` to noise by DDIM inversion and decode them; returns uint8 [N, H, W, C].

        More `steps` or `iterations` reduce the error. Guidance increases it, so the run's guidance
        is not used unless given. (Song et al. 2021, section 4.3.)
        """
        settings.setdefault("guidance_scale", 1.0)
        chosen = self._deterministic(settings)
        return self._inverted(images, iterations, chosen, chosen)

    @checks_arguments
    def text_diff(
        self,
        images: Images,
        from_text: str,
        to_text: str,
        *,
        iterations: Count = 1,
        **settings: Any,
    ) -> Images:
        """Change `images` as the text changes: uint8 [N, H, W, C].

        Inverts them to noise by DDIM with `from_text`, which describes them, and samples from that
        noise with `to_text`. With equal texts and without guidance this is `reconstruct`. Guidance
        is applied to the sampling alone. More `steps` or `iterations` keep more of the images.
        (Song et al. 2021, section 4.3; Mokady et al. 2022, arXiv:2211.09794, section 3.)
        """
        if self.denoiser.takes.tokenizer is None:
            raise ValueError("text_diff is for models trained with text; this one was not")
        if settings.get("prompts") is not None:
            raise ValueError("prompts are given; the texts of text_diff are from_text and to_text")
        require_text("from_text", from_text)
        require_text("to_text", to_text)
        after = self._deterministic({**settings, "prompts": [to_text]})
        unguided = {"negative_prompt": "", "guidance_scale": 1.0}
        before = self._deterministic({**settings, "prompts": [from_text], **unguided})
        return self._inverted(images, iterations, before, after)

    def _inverted(
        self, images: Images, iterations: int, before: SamplingSettings, after: SamplingSettings
    ) -> Images:
        """Invert the images with the settings `before`, and sample with those `after`."""
        plans, size = (self._plan(before), self._plan(after)), self._window

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.reconstruct(self.denoiser, plans, iterations, x, index, size)

        return self._edited(edit, images, after.batch_size)

    def _edited(self, edit: Edit, images: Images, batch_size: int) -> Images:
        found, shape = as_images(images, self.image_shape.channels), self.image_shape
        return editing.in_batches(edit, found, self.denoiser.codec, shape, self.device, batch_size)
