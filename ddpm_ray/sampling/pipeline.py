"""What a notebook holds of a trained network: images in and out as uint8, arguments checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias, Unpack

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.config.option_fields import checks_arguments, limits
from ddpm_ray.config.sampling import Conditioned, SamplingArguments, SamplingConfig
from ddpm_ray.data.transforms import enlarged, to_model_range
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.array_arguments import as_images, as_mask
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.editing import Mask, Method, Painting
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw_uint8, sampling_plan, to_uint8

# Random numbers are keyed by 2^32 indices.
NumImages: TypeAlias = Annotated[int, limits(at_least=1, at_most=2**32)]
Index: TypeAlias = Annotated[int, limits(at_least=0, at_most=2**32 - 1)]
Count: TypeAlias = Annotated[int, limits(at_least=1)]
Margin: TypeAlias = Annotated[int, limits(at_least=0, at_most=65_535)]  # pixels
Share: TypeAlias = Annotated[float, limits(above=0, at_most=1)]


def _unknown() -> None:
    """No names."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained network and all that sampling from it needs; what `ddpm_ray.load` returns.

    Samples are drawn as the run was configured: by `settings`, its `sampling` group, which also
    says how many steps one image takes (`settings.steps`, the T of a run that names all of them).
    Every method takes these settings as keyword arguments, for one call and each on its own:
    `sampler`, `steps`, `spacing`, `eta`, `variance`, `clip`, `dynamic_quantile`, `seed`,
    `batch_size`, `labels`, `guidance_scale`, `guidance_rescale`, `guidance_above_sigma` and
    `guidance_below_sigma`; None leaves the run's own. `with_settings` sets them for all calls.

    Of one `seed`, image i of a call is the same in any call. Of a model trained with labels, it has
    labels[i % len(labels)], numbers or names of classes, all in turn where there are none. Up to
    rounding (one grey level in few pixels) `batch_size`, the images in one network call, changes
    only speed and memory. All raise ValueError for what cannot be.

    Images to be edited may be larger than the model's: it then sees windows that overlap by half.
    They are uint8 arrays, torch tensors, or lists of such images or of PIL's.
    """

    denoiser: Denoiser  # its network is in eval mode, on `device`
    image_shape: tuple[int, int, int]  # (C, H, W)
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    device: torch.device | str = "cpu"

    def __repr__(self) -> str:
        """One line: a notebook shows what a cell ends with."""
        where, step = (self.provenance.get(key) for key in ("checkpoint", "step"))
        channels, height, width = self.image_shape
        return f"TrainedModel({where}, step {step}, {height}x{width}x{channels}, {self.device})"

    settings: SamplingConfig = field(default_factory=SamplingConfig)  # the run's own
    find_label_names: Callable[[], Sequence[str] | None] = _unknown  # old runs ask their data set
    drops_labels: bool = True  # trained with some labels left out, as guidance needs it

    @property
    def label_names(self) -> Sequence[str] | None:
        """Names of classes 0, 1, ...; None where there are no classes, or nobody knows."""
        return self.find_label_names()

    def with_settings(self, **settings: Unpack[SamplingArguments]) -> "TrainedModel":
        """The model with these settings in place of the run's own, for all calls."""
        chosen = self._chosen(settings)
        self.plan_of(chosen)  # tell now what the model cannot do
        return replace(self, settings=chosen)

    @checks_arguments
    def sample(self, num_images: NumImages, **settings: Unpack[SamplingArguments]) -> Images:
        """uint8 images [num_images, H, W, C], drawn from noise as the run draws its own.

        That takes `settings.steps` network calls per batch, 1,000 for many a run: a smaller
        `steps`, with a `sampler` as unipc, is an order of magnitude faster.
        """
        chosen = self._chosen(settings)
        return self.draw(self.plan_of(chosen), num_images, chosen.batch_size)

    @checks_arguments
    def inpaint(
        self,
        images: Images,
        mask: Mask,
        *,
        method: Method = "repaint",
        resamples: Count = 10,
        jump_length: Count = 10,
        **settings: Unpack[SamplingArguments],
    ) -> Images:
        """uint8 [N, H, W, C]: `images` with all that `mask` does not keep painted anew.

        `mask` [H, W], or [N, H, W], is True (or 1) where a pixel is known, and there it comes back
        exactly; image editors and diffusers, whose white is what is painted, mean the opposite: ~
        turns one into the other. `repaint` walks each stretch of `jump_length` steps `resamples`
        times, so that what is painted agrees with what is known: about `resamples` times the
        network calls of `replacement`, which walks once. (Lugmayr et al. 2022, arXiv:2201.09865.)
        `repaint` takes the run's settings but for the sampler, ancestral with fixed_small.
        """
        chosen = self._chosen(settings, repaint=method == "repaint")
        painting = Painting(method, resamples, jump_length)
        return self.paint(self.plan_of(chosen), painting, images, mask, chosen.batch_size)

    @checks_arguments
    def outpaint(
        self,
        images: Images,
        *,
        top: Margin = 0,
        bottom: Margin = 0,
        left: Margin = 0,
        right: Margin = 0,
        method: Method = "repaint",
        resamples: Count = 10,
        jump_length: Count = 10,
        **settings: Unpack[SamplingArguments],
    ) -> Images:
        """uint8 [N, top + H + bottom, left + W + right, C]: `images`, exactly, and what surrounds.

        The rest is as in `inpaint`. The whole must be at least as large as the model's images.
        """
        chosen = self._chosen(settings, repaint=method == "repaint")
        painting = Painting(method, resamples, jump_length)
        known = as_images(images, self.image_shape[0])
        canvas, mask = editing.on_canvas(known, top, bottom, left, right)
        return self.paint(self.plan_of(chosen), painting, canvas, mask, chosen.batch_size)

    @checks_arguments
    def image_to_image(
        self, images: Images, strength: Share, **settings: Unpack[SamplingArguments]
    ) -> Images:
        """uint8 [N, H, W, C]: `images` noised up to step `strength` T and drawn again from there.

        At a `strength` near 0 they stay as they are, at 1 hardly anything is left of them; it takes
        about strength times `steps`. (SDEdit, Meng et al. 2022, arXiv:2108.01073.)
        """
        chosen = self._chosen(settings)
        return self.vary(self.plan_of(chosen), images, strength, chosen.batch_size)

    def enlarge(self, images: Images, **settings: Unpack[SamplingArguments]) -> Images:
        """uint8 [N, H, W, C]: `images` [N, h, w, C] at the size of the model's, details invented.

        Of a model trained for super-resolution (Saharia et al. 2021, arXiv:2104.07636), as the
        last of a cascade (Ho et al. 2022, arXiv:2106.15282).
        """
        chosen = self._chosen(settings)
        return self.upscale(self.plan_of(chosen), images, chosen.batch_size)

    @checks_arguments
    def upscale(self, plan: SamplingPlan, images: Images, batch_size: Count) -> Images:
        """`enlarge` by a plan."""
        found = as_images(images, self.image_shape[0])
        pixels, size = self.denoiser.low_resolution_pixels, self.image_shape[1:]
        if found.shape[1:3] != (pixels, pixels):
            raise ValueError(
                f"images are {found.shape[1]} x {found.shape[2]}; this model enlarges those of "
                f"{pixels} x {pixels} (0: none; objective.low_resolution_pixels)"
            )
        small = to_model_range(torch.from_numpy(found).to(self.device))
        denoiser = replace(self.denoiser, low_resolution_images=enlarged(small, size))
        return replace(self, denoiser=denoiser).draw(plan, len(found), batch_size)

    @checks_arguments
    def interpolate(
        self,
        first: Index,
        last: Index,
        num_images: Annotated[int, limits(at_least=2, at_most=2**32)],
        *,
        label: int | str | None = None,
        **settings: Unpack[SamplingArguments],
    ) -> Images:
        """uint8 [num_images, H, W, C]: from image `first` of `seed` to image `last`, by DDIM.

        Evenly along the arc between their noises, ends included. All have one `label`, by default
        that of `first`; DDIM adds no noise here, whatever the run's own sampler and `eta` are.
        (Song et al. 2021, arXiv:2010.02502, appendix D.5.)
        """
        if label is not None:
            if settings.get("labels") is not None:
                raise ValueError(
                    "label and labels are given; the images have one label: give label"
                )
            settings["labels"] = label
        chosen = self._deterministic(settings)
        plan, shape, ends = self.plan_of(chosen), self.image_shape, (first, last)
        shares = torch.linspace(0, 1, num_images, dtype=torch.float64)
        parts = (
            editing.interpolate(self.denoiser, plan, ends, part, shape, self.device)
            for part in torch.split(shares, chosen.batch_size)
        )
        return np.concatenate([to_uint8(part) for part in parts])

    @checks_arguments
    def reconstruct(
        self, images: Images, *, iterations: Count = 1, **settings: Unpack[SamplingArguments]
    ) -> Images:
        """uint8 [N, H, W, C]: `images` taken to their noise by DDIM's inversion, and back again.

        More `steps` or `iterations` bring back more of them; guidance does not, and the run's own
        is left out. (Song et al. 2021, section 4.3.)
        """
        settings.setdefault("guidance_scale", 1.0)
        chosen = self._deterministic(settings)
        plan, size = self.plan_of(chosen), self.image_shape[1]

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.reconstruct(self.denoiser, plan, iterations, x, index, size)

        return self._edited(edit, images, chosen.batch_size)

    def plan(self, **settings: Unpack[SamplingArguments]) -> SamplingPlan:
        """The steps of the run's own settings with these in their place."""
        return self.plan_of(self._chosen(settings))

    def plan_of(self, settings: SamplingConfig) -> SamplingPlan:
        """The steps of these settings; raises ValueError for what this model cannot do."""
        of = self.denoiser
        model = Conditioned(of.num_classes, self.drops_labels, of.variance != "fixed")
        guided = of.guidance_model is not None
        problems = [
            *settings.problems("", of.schedule.num_steps),
            *settings.incompatibilities(
                "", model, guided_by_model=guided, guidance_classes=of.guidance_classes
            ),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        names = self.label_names if settings.has_names else None
        return sampling_plan(settings, of.schedule, names)

    def _chosen(self, given: SamplingArguments, *, repaint: bool = False) -> SamplingConfig:
        own = self.settings.for_repaint() if repaint else self.settings
        return own.overridden(given, self.denoiser.schedule.num_steps)

    def _deterministic(self, given: SamplingArguments) -> SamplingConfig:
        own = replace(self.settings, sampler="ddim", eta=0.0, variance="fixed_small")
        return own.overridden(given, self.denoiser.schedule.num_steps)

    @checks_arguments
    def draw(
        self,
        plan: SamplingPlan,
        num_images: NumImages,
        batch_size: Count,
        on_step: OnStep | None = None,
    ) -> Images:
        """The images 0..num_images-1 of `plan`, uint8 [num_images, H, W, C].

        `on_step(t, x_t, x_0_estimate)` sees each step of each batch, and copies what it keeps.
        """
        indices, shape = range(num_images), self.image_shape
        return draw_uint8(self.denoiser, plan, indices, shape, self.device, batch_size, on_step)

    @checks_arguments
    def paint(
        self, plan: SamplingPlan, painting: Painting, images: Images, mask: Mask, batch_size: Count
    ) -> Images:
        """`inpaint` by a plan; `repaint` takes those of ancestral and ddim alone."""
        known, size = as_images(images, self.image_shape[0]), self.image_shape[1]
        keep = torch.from_numpy(as_mask(mask, known)).to(self.device)

        def edit(x: Tensor, index: Tensor) -> Tensor:
            rows = keep if len(keep) == 1 else keep[index]
            return editing.inpaint(self.denoiser, plan, painting, x, rows, index, size)

        return self._edited(edit, known, batch_size)

    @checks_arguments
    def vary(
        self, plan: SamplingPlan, images: Images, strength: Share, batch_size: Count
    ) -> Images:
        """`image_to_image` by a plan."""
        size = self.image_shape[1]

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.image_to_image(self.denoiser, plan, strength, x, index, size)

        return self._edited(edit, images, batch_size)

    def _edited(
        self, edit: Callable[[Tensor, Tensor], Tensor], images: Images, batch_size: int
    ) -> Images:
        """All images by `edit(x [b, C, H, W], their indices [b])`."""
        found = as_images(images, self.image_shape[0])
        (_, size, _), (count, height, width, _) = self.image_shape, found.shape
        if min(height, width) < size:
            raise ValueError(
                f"images are {height} x {width} and those of the model {size} x {size}; it edits "
                "none that are smaller: enlarge them, or outpaint with margins"
            )
        at_once = max(1, batch_size // editing.windows(height, width, size))
        parts = []
        for index in torch.split(torch.arange(count), at_once):
            x = to_model_range(torch.from_numpy(found[index.numpy()]).to(self.device))
            parts.append(to_uint8(edit(x, index.to(self.device))))
        return np.concatenate(parts)
