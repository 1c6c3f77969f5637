"""What a notebook holds of a trained network: images in and out as uint8, arguments checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ddpm_ray.data.transforms import enlarged, to_model_range
from ddpm_ray.diffusion import spacing
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.generation import editing
from ddpm_ray.generation.denoiser import Denoiser, Guidance
from ddpm_ray.generation.editing import Mask, Method, Painting
from ddpm_ray.generation.sample import (
    Images,
    Sampler,
    SamplingPlan,
    draw_uint8,
    first_step,
    to_uint8,
)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained network and all that sampling from it needs; what `ddpm_ray.load` returns.

    Its methods share their last arguments. `steps` steps per image, evenly spaced over 1..T. Of one
    `seed`, image i of a call is the same in any call. Of a model trained with labels, it has
    labels[i % len(labels)], by default all classes in turn; a `guidance_scale` above 1 draws it
    more strongly there. Up to rounding (one grey level in few pixels) `batch_size`, the images in
    one network call, changes only speed and memory. All raise ValueError for what cannot be.

    Images to be edited may be larger than the model's: it then sees windows that overlap by half.
    """

    denoiser: Denoiser  # its network is in eval mode, on `device`
    image_shape: tuple[int, int, int]  # (C, H, W)
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    device: torch.device | str = "cpu"

    def sample(
        self,
        num_images: int,
        *,
        steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> Images:
        """uint8 images [num_images, H, W, C], drawn from noise."""
        plan = self.plan(steps, sampler, seed, labels, guidance_scale, eta)
        return self.draw(plan, num_images, batch_size)

    def inpaint(
        self, images: Images, mask: Mask, *, method: Method = "repaint", resamples: int = 10,
        jump_length: int = 10, steps: int = 50, seed: int = 0,
        labels: Sequence[int] | None = None, guidance_scale: float = 1.0, batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [N, H, W, C]: `images` with all that `mask` does not keep painted anew.

        `mask` [H, W], or [N, H, W], is True (or 1) where a pixel is known, and there it comes back
        exactly; image editors and diffusers, whose white is what is painted, mean the opposite: ~
        turns one into the other. `repaint` walks each stretch of `jump_length` steps `resamples`
        times, so that what is painted agrees with what is known: about `resamples` times the
        network calls of `replacement`, which walks once. (Lugmayr et al. 2022, arXiv:2201.09865.)
        """
        plan = self.plan(steps, "ancestral", seed, labels, guidance_scale)
        painting = Painting(method, resamples, jump_length)
        return self.paint(plan, painting, images, mask, batch_size)

    def outpaint(
        self, images: Images, *, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0,
        method: Method = "repaint", resamples: int = 10, jump_length: int = 10, steps: int = 50,
        seed: int = 0, labels: Sequence[int] | None = None, guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [N, top + H + bottom, left + W + right, C]: `images`, exactly, and what surrounds.

        The rest is as in `inpaint`. The whole must be at least as large as the model's images.
        """
        plan = self.plan(steps, "ancestral", seed, labels, guidance_scale)
        painting = Painting(method, resamples, jump_length)
        self._require_images(images)
        canvas, mask = editing.on_canvas(images, top, bottom, left, right)
        return self.paint(plan, painting, canvas, mask, batch_size)

    def image_to_image(
        self, images: Images, strength: float, *, steps: int = 50, sampler: Sampler = "ddim",
        eta: float = 0.0, seed: int = 0, labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0, batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [N, H, W, C]: `images` noised up to step `strength` T and drawn again from there.

        At a `strength` near 0 they stay as they are, at 1 hardly anything is left of them; it takes
        about strength times `steps`. (SDEdit, Meng et al. 2022, arXiv:2108.01073.)
        """
        plan = self.plan(steps, sampler, seed, labels, guidance_scale, eta)
        return self.vary(plan, images, strength, batch_size)

    def enlarge(
        self, images: Images, *, steps: int = 50, sampler: Sampler = "ddim", eta: float = 0.0,
        seed: int = 0, labels: Sequence[int] | None = None, guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [N, H, W, C]: `images` [N, h, w, C] at the size of the model's, details invented.

        Of a model trained for super-resolution (Saharia et al. 2021, arXiv:2104.07636), as the
        last of a cascade (Ho et al. 2022, arXiv:2106.15282).
        """
        plan = self.plan(steps, sampler, seed, labels, guidance_scale, eta)
        return self.magnify(plan, images, batch_size)

    def magnify(self, plan: SamplingPlan, images: Images, batch_size: int) -> Images:
        """`enlarge` by a plan."""
        self._require_images(images)
        pixels, size = self.denoiser.low_resolution_pixels, self.image_shape[1:]
        if images.shape[1:3] != (pixels, pixels):
            raise ValueError(
                f"images are {images.shape[1]} x {images.shape[2]}; this model enlarges those of "
                f"{pixels} x {pixels} (0: none; objective.low_resolution_pixels)"
            )
        small = to_model_range(torch.from_numpy(images).to(self.device))
        denoiser = replace(self.denoiser, low=enlarged(small, size))
        return replace(self, denoiser=denoiser).draw(plan, len(images), batch_size)

    def interpolate(
        self, first: int, last: int, num_images: int, *, steps: int = 50, seed: int = 0,
        label: int | None = None, guidance_scale: float = 1.0, batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [num_images, H, W, C]: from image `first` of `seed` to image `last`, by DDIM.

        Evenly along the arc between their noises, ends included. All have one `label`, by default
        that of `first` (Song et al. 2021, arXiv:2010.02502, appendix D.5).
        """
        if num_images < 2:
            raise ValueError(f"num_images is {num_images}; from one to the other takes at least 2")
        plan = self.plan(steps, "ddim", seed, None if label is None else [label], guidance_scale)
        _require_positive(batch_size=batch_size)
        shares = torch.linspace(0, 1, num_images, dtype=torch.float64)
        of, shape, ends = self.denoiser, self.image_shape, (first, last)
        parts = (
            editing.interpolate(of, plan, ends, part, shape, self.device)
            for part in torch.split(shares, batch_size)
        )
        return np.concatenate([to_uint8(part) for part in parts])

    def reconstruct(
        self, images: Images, *, steps: int = 50, iterations: int = 1,
        labels: Sequence[int] | None = None, batch_size: int = 64,
    ) -> Images:  # fmt: skip
        """uint8 [N, H, W, C]: `images` taken to their noise by DDIM's inversion, and back again.

        More `steps` or `iterations` bring back more of them (Song et al. 2021, section 4.3).
        """
        plan, size = self.plan(steps, labels=labels), self.image_shape[1]

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.reconstruct(self.denoiser, plan, iterations, x, index, size)

        return self._edited(edit, images, batch_size)

    def plan(
        self,
        steps: int,
        sampler: Sampler = "ddim",
        seed: int = 0,
        labels: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
    ) -> SamplingPlan:
        """So many steps, evenly spaced; raises ValueError for what this model cannot take."""
        _require_choice("sampler", sampler, get_args(Sampler))
        num_steps, known = self.denoiser.schedule.num_steps, self.denoiser.num_classes
        if not 1 <= steps <= num_steps:
            raise ValueError(
                f"steps is {steps}; this model was trained with T = {num_steps} diffusion steps, "
                f"so choose from 1..{num_steps}"
            )
        labels = tuple(labels or ())
        if wrong := [label for label in labels if not 0 <= label < known]:
            knows = f"this model knows 0 to {known - 1}" if known else "it was trained without"
            raise ValueError(f"labels has {wrong[0]!r}; {knows}{'' if known else ' labels'}")
        first = first_step(self.denoiser.schedule, sampler)
        at = spacing.uniform_steps(first, min(steps, first))
        guidance = Guidance(guidance_scale)
        return SamplingPlan(at, sampler, eta, seed=seed, labels=labels, guidance=guidance)

    def draw(
        self,
        plan: SamplingPlan,
        num_images: int,
        batch_size: int,
        on_step: OnStep | None = None,
    ) -> Images:
        """The images 0..num_images-1 of `plan`, uint8 [num_images, H, W, C].

        `on_step(t, x_t, x_0_estimate)` sees each step of each batch, and copies what it keeps.
        """
        _require_positive(num_images=num_images, batch_size=batch_size)
        indices, shape = range(num_images), self.image_shape
        return draw_uint8(self.denoiser, plan, indices, shape, self.device, batch_size, on_step)

    def paint(
        self, plan: SamplingPlan, painting: Painting, images: Images, mask: Mask, batch_size: int
    ) -> Images:
        """`inpaint` by a plan; `repaint` takes those of ancestral and ddim alone."""
        _require_choice("method", painting.method, get_args(Method))
        self._require_images(images)
        size, keep = self.image_shape[1], _kept(mask, images).to(self.device)

        def edit(x: Tensor, index: Tensor) -> Tensor:
            rows = keep if len(keep) == 1 else keep[index]
            return editing.inpaint(self.denoiser, plan, painting, x, rows, index, size)

        return self._edited(edit, images, batch_size)

    def vary(self, plan: SamplingPlan, images: Images, strength: float, batch_size: int) -> Images:
        """`image_to_image` by a plan."""
        size = self.image_shape[1]

        def edit(x: Tensor, index: Tensor) -> Tensor:
            return editing.image_to_image(self.denoiser, plan, strength, x, index, size)

        return self._edited(edit, images, batch_size)

    def _edited(
        self, edit: Callable[[Tensor, Tensor], Tensor], images: Images, batch_size: int
    ) -> Images:
        """All images by `edit(x [b, C, H, W], their indices [b])`."""
        _require_positive(batch_size=batch_size)
        self._require_images(images)
        (_, size, _), (count, height, width, _) = self.image_shape, images.shape
        if min(height, width) < size:
            raise ValueError(
                f"images are {height} x {width} and those of the model {size} x {size}; it edits "
                "none that are smaller: enlarge them, or outpaint with margins"
            )
        at_once = max(1, batch_size // editing.windows(height, width, size))
        parts = []
        for index in torch.split(torch.arange(count), at_once):
            x = to_model_range(torch.from_numpy(images[index.numpy()]).to(self.device))
            parts.append(to_uint8(edit(x, index.to(self.device))))
        return np.concatenate(parts)

    def _require_images(self, images: Images) -> None:
        channels, found = self.image_shape[0], np.asarray(images)
        sound = found.dtype == np.uint8 and found.ndim == 4 and len(found)
        if not sound or found.shape[3] != channels:
            raise ValueError(
                f"images are {found.dtype} {list(found.shape)}; give uint8 [N, H, W, {channels}], "
                "one image as image[None]"
            )


def _kept(mask: Mask, images: Images) -> Tensor:
    """The mask as bool [N or 1, 1, H, W]."""
    whole = np.asarray(mask)
    if whole.shape not in (images.shape[1:3], images.shape[:3]):
        found, wanted = (" x ".join(map(str, a)) for a in (whole.shape, images.shape[1:3]))
        raise ValueError(
            f"mask is {found} and the images {wanted}; give one mask of their height and width, "
            "or one for each"
        )
    keep = whole.astype(bool)
    if not (keep == whole).all():
        raise ValueError(
            f"mask holds {whole[keep != whole][0]}; it is True or 1 where a pixel is known and "
            "False or 0 where one is painted: compare it, as in mask < 128"
        )
    if keep.all() or not keep.any():
        found, remedy = ("True", "nothing is") if keep.all() else ("False", "all of it is")
        raise ValueError(
            f"mask is {found} everywhere, so {remedy} to be painted; it is True where a pixel is "
            "known: to draw whole images use sample"
        )
    return torch.from_numpy(keep).view(-1, 1, *keep.shape[-2:])


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
