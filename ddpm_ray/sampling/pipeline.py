"""The notebook interface to a trained model: uint8 images in and out, checked arguments."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.config.jobs.edit import MOST_MARGIN, InpaintingMethod
from ddpm_ray.config.option_fields import checks_arguments, limits, shown
from ddpm_ray.config.sampling import MOST_IMAGES, PROMPTS_REMEDY, SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.low_resolution import enlarged
from ddpm_ray.data.tokenizer import warn_of_cut_prompts
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import canvas, editing
from ddpm_ray.sampling.array_arguments import as_images, as_low_resolution, as_mask, require_text
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.editing import Edit, Mask, Painting
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw_uint8, sampling_plan

NumImages: TypeAlias = Annotated[int, limits(at_least=1, at_most=MOST_IMAGES)]
Index: TypeAlias = Annotated[int, limits(at_least=0, at_most=MOST_IMAGES - 1)]
Count: TypeAlias = Annotated[int, limits(at_least=1)]
Margin: TypeAlias = Annotated[int, limits(at_least=0, at_most=MOST_MARGIN)]  # pixels
Share: TypeAlias = Annotated[float, limits(above=0, at_most=1)]


def _unknown() -> None:
    """The label names of a model that has none."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model ready for sampling; returned by `ddpm_ray.load`.

    `settings`, the `sampling` group of the run's config, holds the defaults; `settings.steps` is
    the number of steps per image. Every method accepts its fields as keyword arguments for one
    call, `with_settings` for all calls; None keeps the run's value. They are `sampler`, `steps`,
    `spacing`, `eta`, `variance`, `clip`, `dynamic_quantile`, `seed`, `batch_size`, `labels`,
    `prompts`, `negative_prompt`, and `guidance_` with `scale`, `rescale`, `above_sigma` and
    `below_sigma`.

    Image i is determined by `seed` and i. If the model has classes, image i has the label
    labels[i % len(labels)], given by number or name; without `labels`, all classes in turn.
    `batch_size` is the number of images per network call; it changes results only by rounding (one
    grey level in few pixels). All methods raise ValueError for invalid arguments.

    A model of latents also takes and returns pixels, through its autoencoder. Known pixels are
    returned unchanged; a latent counts as known if all its pixels are.

    Images to edit are uint8 arrays, torch tensors, or lists of these or of PIL images. Large images
    are denoised in windows of the model's size that overlap by half.
    """

    denoiser: Denoiser  # network in eval mode on `device`
    image_shape: ImageShape
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    device: torch.device | str = "cpu"

    def __repr__(self) -> str:
        """Checkpoint, step if known, image shape and device, in one line."""
        where, step = (self.provenance.get(key) for key in ("checkpoint", "step"))
        at = "" if step is None else f", step {step}"
        return f"TrainedModel({where}{at}, {self.image_shape}, {self.device})"

    settings: SamplingSettings = field(default_factory=SamplingSettings)  # of the run
    find_label_names: Callable[[], Sequence[str] | None] = _unknown  # lazy: may read the data set
    drops_labels: bool = True  # trained with label dropout, which guidance needs

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the model's images."""
        return self.image_shape[:2]

    @property
    def label_names(self) -> Sequence[str] | None:
        """Names of classes 0, 1, ...; None without classes or if their names are unknown."""
        return self.find_label_names()

    def with_settings(self, **settings: Any) -> "TrainedModel":
        """A copy of the model with these settings as defaults for all calls."""
        chosen = self._chosen(settings)
        self._plan(chosen)  # raises for settings that this model does not support
        return replace(self, settings=chosen)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The steps that the settings visit, from T down to 0."""
        return self._plan(self.settings).steps

    @checks_arguments
    def sample(
        self, num_images: NumImages, *, on_step: OnStep | None = None, **settings: Any
    ) -> Images:
        """Draw uint8 images [num_images, H, W, C] with the run's settings.

        Each batch takes about `settings.steps` network calls, 1,000 for many runs; fewer `steps`
        with a sampler such as unipc are an order of magnitude faster. `on_step(t, x_t,
        x_0_estimate)` is called at each step of each batch and must copy tensors that it keeps;
        `preview` shows them.
        """
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step is {shown(on_step)}; give a function of (t, x_t, x_0)")
        chosen = self._chosen(settings)
        plan, shape = self._plan(chosen), self.image_shape
        indices = range(num_images)
        return draw_uint8(
            self.denoiser, plan, indices, shape, self.device, chosen.batch_size, on_step
        )

    def preview(self, x: Tensor) -> Images:
        """Show x_t or an estimate of x_0, as `on_step` gets them, as uint8 images [N, H, W, C].

        Latents are shown by their linear map to colours, without a call of the decoder; each latent
        is a square of one colour. A model without that map (imported, or trained by an earlier
        version) decodes them.
        """
        return self.denoiser.codec.show_noisy(x)

    @checks_arguments
    def inpaint(
        self,
        images: Images,
        mask: Mask,
        *,
        method: InpaintingMethod = "auto",
        resamples: Count = 10,
        jump_length: Count = 10,
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
        """
        painting = Painting(method, resamples, jump_length).chosen_for(self.denoiser)
        chosen = self._chosen(settings, repaint=painting.method == "repaint")
        plan, factor = self._plan(chosen), self.denoiser.codec.factor
        known, size = as_images(images, self.image_shape.channels), self._window
        keep = as_mask(mask, known)
        cells = canvas.known_cells(keep, factor).to(self.device)
        whole = canvas.filled(known, keep) if factor > 1 else known

        def edit(x: Tensor, index: Tensor) -> Tensor:
            rows = cells if len(cells) == 1 else cells[index]
            return editing.inpaint(self.denoiser, plan, painting, x, rows, index, size)

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
        method: InpaintingMethod = "auto",
        resamples: Count = 10,
        jump_length: Count = 10,
        **settings: Any,
    ) -> Images:
        """Extend `images` by margins; returns uint8 [N, top + H + bottom, left + W + right, C].

        Other arguments are as in `inpaint`. The result must be at least as large as the model's
        images.
        """
        known = as_images(images, self.image_shape.channels)
        extended, mask = editing.outpainting_canvas(known, top, bottom, left, right)
        return self.inpaint(
            extended, mask, method=method, resamples=resamples, jump_length=jump_length, **settings
        )

    @checks_arguments
    def image_to_image(self, images: Images, strength: Share, **settings: Any) -> Images:
        """Vary `images` by SDEdit: add noise up to step `strength` T and denoise from there.

        Returns uint8 [N, H, W, C]. A `strength` near 0 keeps the images, 1 keeps almost nothing of
        them. Takes about strength times `steps` steps. (Meng et al. 2022, arXiv:2108.01073.)
        """
        chosen = self._chosen(settings)
        plan, size = self._plan(chosen), self._window

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.image_to_image(self.denoiser, plan, strength, x, index, size)

        return self._edited(edit, images, chosen.batch_size)

    def enlarge(self, images: Images, **settings: Any) -> Images:
        """Upscale `images` [N, h, w, C] to the model's size; returns uint8 [N, H, W, C].

        For models trained for super-resolution (Saharia et al. 2021, arXiv:2104.07636), such as
        the last stage of a cascade (Ho et al. 2022, arXiv:2106.15282).
        """
        pixels = self.denoiser.takes.low_resolution_pixels
        found = as_low_resolution(images, self.image_shape, pixels)
        small = self.denoiser.codec.encode(torch.from_numpy(found).to(self.device))
        denoiser = replace(self.denoiser, low_resolution_images=enlarged(small, self.image_size))
        return replace(self, denoiser=denoiser).sample(len(found), **settings)

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

    def problems(self, prefix: str = "", *, guided_by_model: bool | None = None) -> Iterator[str]:
        """Yield a line for each of `settings` that this model does not support.

        `prefix` is the group of their keys. `guided_by_model`: a guidance model takes the labels;
        None: if there is one.
        """
        model = self.denoiser.sampled_model(self.drops_labels, guided_by_model)
        return self.settings.problems(prefix, model)

    @property
    def _window(self) -> tuple[int, int]:
        """(h, w) of x_0 for images of the model's shape: what the network sees at once."""
        return self.denoiser.codec.shape(self.image_shape)[1:]

    def _plan(self, settings: SamplingSettings) -> SamplingPlan:
        """The sampling plan of `settings`; raises ValueError for unsupported ones."""
        model = self.denoiser.sampled_model(self.drops_labels)
        if problems := list(settings.problems("", model)):
            raise ValueError("; ".join(problems))
        names = self.label_names if settings.has_names else None
        plan = sampling_plan(settings, self.denoiser.schedule, names)
        if (tokenizer := self.denoiser.takes.tokenizer) is not None:
            negative = filter(None, [settings.negative_prompt])
            warn_of_cut_prompts(tokenizer, (*plan.settings.prompts, *negative))
        return plan

    def _chosen(self, given: dict[str, Any], *, repaint: bool = False) -> SamplingSettings:
        own = self.settings.for_repaint() if repaint else self.settings
        return _overridden(own, given, self.denoiser.schedule.num_steps)

    def _deterministic(self, given: dict[str, Any]) -> SamplingSettings:
        own = replace(self.settings, sampler="ddim", eta=0.0, variance="fixed_small")
        return _overridden(own, given, self.denoiser.schedule.num_steps)

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


def _overridden(own: SamplingSettings, given: dict[str, Any], num_steps: int) -> SamplingSettings:
    """`own` with the values of a call. Raises ValueError, also for an empty list of prompts."""
    chosen = own.overridden(given, num_steps)
    if given.get("prompts") is not None and not chosen.prompts:
        raise ValueError(f"prompts is empty; {PROMPTS_REMEDY}")
    return chosen
