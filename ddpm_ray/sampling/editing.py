"""Edit images with a denoiser: inpainting, image-to-image, interpolation, reconstruction.

The noise of image i depends on (seed, i) only, as in sampling.py. Images may be larger than the
images that the network was trained on, of size S = (height, width): they are then denoised in
windows of that size that overlap by half. A mask [N or 1, 1, H, W] is True where a pixel is known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.config.jobs.edit import InpaintingMethod, inpainting_method
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.codec import Codec, channels_first, channels_last
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import inpainting, inversion, samplers
from ddpm_ray.diffusion.conditioning import known_part
from ddpm_ray.diffusion.process import Denoise, add_noise
from ddpm_ray.diffusion.samplers import Noise, OnStep
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from ddpm_ray.sampling import canvas
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, run_sampler

Size: TypeAlias = tuple[int, int]  # (height, width)
Edit: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""edit(x_0 [B, C, H, W], index [B]) -> x_0: an edit of the images of these indices."""
Mask: TypeAlias = npt.NDArray[np.bool_]
"""[H, W] for all images or [N, H, W]: True where a pixel is known and kept."""


@dataclass(frozen=True)
class Painting:
    """Inpainting method; see `repaint` and `replacement` in diffusion/inpainting.py.

    `conditioned` gives the known part to the network, which must be trained for it. `auto` stands
    for `conditioned` for such a network, and for `repaint` otherwise.
    """

    method: InpaintingMethod = "auto"
    resamples: int = 10  # repaint: how often each section of the steps is repeated
    jump_length: int = 10  # repaint: number of steps of a section

    def chosen_for(self, denoiser: Denoiser) -> "Painting":
        """The method that `auto` stands for. Raises ValueError for one that needs another model."""
        method = inpainting_method(self.method, conditioned=denoiser.takes.known_pixels)
        return replace(self, method=method)


def inpaint(
    denoiser: Denoiser,
    plan: SamplingPlan,
    painting: Painting,
    known: Tensor,
    mask: Tensor,
    index: Tensor,
    size: Size,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Repaint `known` [N, C, H, W] where `mask` is False; elsewhere the result is bit-identical.

    The noise is that of the images `index` [N]; `size` is S. Raises ValueError for a method that
    the model does not support, and if `repaint` is combined with a sampler or variance that it does
    not support.
    """
    painting = painting.chosen_for(denoiser)
    x_T = normal(plan.settings.seed, Purpose.SAMPLE_START, 0, index, known.shape[1:])
    noise = _noise(plan, index, known)
    if painting.method == "conditioned":
        denoise = _windowed_denoiser(denoiser, plan, index, known, size, known_part(known, mask))
        return inpainting.paste(
            run_sampler(denoiser, denoise, plan, x_T, noise, on_step), known, mask
        )
    denoise = _windowed_denoiser(denoiser, plan, index, known, size)
    if painting.method == "replacement":
        start = torch.full_like(index, plan.steps[0])
        x_T = torch.where(mask, add_noise(denoiser.schedule, known, start, x_T), x_T)
        seeing = inpainting.replacement(denoise, denoiser.parameterization, known, mask)
        return inpainting.paste(
            run_sampler(denoiser, seeing, plan, x_T, noise, on_step), known, mask
        )
    sampler, variance = plan.settings.sampler, plan.settings.variance
    if sampler not in ("ancestral", "ddim") or variance != "fixed_small":
        raise ValueError(
            f"sampler is {sampler!r} and variance {variance!r}; repaint supports ancestral and "
            "ddim with fixed_small: use one of these, or method=replacement"
        )
    return inpainting.repaint(
        denoiser.estimator(denoise, plan.clipping(denoiser.codec)),
        x_T,
        inpainting.jump_schedule(plan.steps, painting.jump_length, painting.resamples),
        known=known,
        mask=mask,
        noise=noise,
        eta=1.0 if sampler == "ancestral" else plan.settings.eta,
        on_step=on_step,
    )


def image_to_image(
    denoiser: Denoiser,
    plan: SamplingPlan,
    strength: float,
    images: Tensor,
    index: Tensor,
    size: Size,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Vary `images` [N, C, H, W]: add noise up to step `strength` T, then denoise.

    (SDEdit, Meng et al. 2022, arXiv:2108.01073.) `size` is S. Raises ValueError for a strength
    outside (0, 1], or below the plan's last step.
    """
    noise = normal(plan.settings.seed, Purpose.SAMPLE_START, 0, index, images.shape[1:])
    x_t, left = inpainting.sdedit(denoiser.schedule, images, plan.steps, strength, noise)
    denoise = _windowed_denoiser(denoiser, plan, index, images, size)
    rest = replace(plan, steps=left)
    return run_sampler(denoiser, denoise, rest, x_t, _noise(plan, index, images), on_step)


def interpolate_samples(
    denoiser: Denoiser,
    plan: SamplingPlan,
    ends: tuple[int, int],
    shares: Tensor,
    image_shape: ImageShape,
    device: torch.device | str,
) -> Tensor:
    """Interpolate between the images of the two indices `ends`: [len(shares), C, H, W].

    Image i is DDIM's for the noise at shares[i], 0 to 1, on the arc between the noises of the ends
    (Song et al. 2021, arXiv:2010.02502, appendix D.5). All have the label and
    the prompt of the first end.
    """
    index = torch.tensor(ends, device=device)
    shape = denoiser.codec.shape(image_shape)
    first, last = normal(plan.settings.seed, Purpose.SAMPLE_START, 0, index, shape).chunk(2)
    x_T: Tensor = torch.cat(
        [inversion.interpolate(first, last, share) for share in shares.tolist()]
    )
    conditioning = denoiser.conditioning(
        index[:1].expand(len(shares)), plan.labels, plan.settings.prompts
    )
    denoise = denoiser.without_variance(denoiser.bind_conditioning(conditioning, plan.guidance))
    estimate = denoiser.estimator(denoise, plan.clipping(denoiser.codec))
    return samplers.ddim(estimate, x_T, plan.steps)


def reconstruct(
    denoiser: Denoiser,
    plans: tuple[SamplingPlan, SamplingPlan],
    iterations: int,
    images: Tensor,
    index: Tensor,
    size: Size,
) -> Tensor:
    """Invert `images` [N, C, H, W] to noise by DDIM and sample from that noise again.

    The first plan inverts, the second samples. If they are equal, the error measures how well their
    steps follow the probability flow; with other prompts the images change as the texts do.
    `iterations` is as in `inversion.ddim_inversion`; `size` is S.
    """

    def fresh(plan: SamplingPlan) -> X0Estimator:  # self-conditioning keeps state of one run
        denoise = _windowed_denoiser(denoiser, plan, index, images, size)
        return denoiser.estimator(denoiser.without_variance(denoise), clip=None)

    before, after = plans
    x_T = inversion.ddim_inversion(fresh(before), images, before.steps, iterations=iterations)
    return samplers.ddim(fresh(after), x_T, after.steps)


def outpainting_canvas(
    images: Images, top: int, bottom: int, left: int, right: int
) -> tuple[Images, Mask]:
    """Add margins to uint8 images [N, H, W, C]; return them and the mask of known pixels [H, W].

    Raises ValueError if all margins are 0.
    """
    if not any((top, bottom, left, right)):
        raise ValueError("top, bottom, left and right are 0; outpainting adds pixels: set one")
    height, width = images.shape[1] + top + bottom, images.shape[2] + left + right
    pixels = channels_first(torch.tensor(images))
    whole, mask = inpainting.on_canvas(pixels, height, width, top, left)
    return channels_last(whole).numpy(), mask[0, 0].numpy()


def fit(result: Images, known: Images, mask: Mask) -> dict[str, float | None]:
    """Measure an inpainting: `known_error` in grey levels (0 if exact) and `seam` (1: invisible).

    See diffusion/inpainting.py. The seam is a mean over images, None if it is undefined.
    """
    painted, given = (channels_first(torch.tensor(x)).float() for x in (result, known))
    keep = torch.tensor(mask).view(-1, 1, *mask.shape[-2:])
    seam = float(inpainting.seam(painted, keep).mean())
    error = inpainting.known_error(painted, given, keep)
    return {"known_error": error, "seam": seam if math.isfinite(seam) else None}


def in_batches(
    edit: Edit,
    images: Images,
    codec: Codec,
    image_shape: ImageShape,
    device: torch.device | str,
    batch_size: int,
) -> Images:
    """Apply `edit` to uint8 images [N, H, W, C]; `batch_size` windows per network call.

    `image_shape` is that of the model. Sides that the codec's factor does not divide are padded,
    and cut off afterwards. Raises ValueError for images smaller than the model's.
    """
    size, (count, height, width, _) = image_shape[:2], images.shape
    factor = codec.factor
    if height + -height % factor < size[0] or width + -width % factor < size[1]:
        raise ValueError(
            f"images, with their margins, are {height} x {width} (height x width); the model edits "
            f"images of at least {size[0]} x {size[1]}: enlarge them, or outpaint by more"
        )
    whole = canvas.padded(images, factor)
    rows, columns = (side // factor for side in whole.shape[1:3])
    at_once = max(1, batch_size // windows(rows, columns, codec.shape(image_shape)[1:]))
    parts = []
    for index in torch.split(torch.arange(count), at_once):
        x_0 = codec.encode_images(torch.from_numpy(whole[index.numpy()]).to(device))
        parts.append(codec.decode(edit(x_0, index.to(device))))
    return np.ascontiguousarray(np.concatenate(parts)[:, :height, :width])


def windows(height: int, width: int, size: Size) -> int:
    """Number of windows of `size` that cover an image of height x width."""
    return math.prod(
        1 + math.ceil((length - side) / (side - side // 2))
        for length, side in zip((height, width), size, strict=True)
    )


def _windowed_denoiser(
    denoiser: Denoiser,
    plan: SamplingPlan,
    index: Tensor,
    images: Tensor,
    size: Size,
    known: Tensor | None = None,
) -> Denoise:
    """The denoiser for `images` with conditioning bound, in windows if they exceed `size`.

    `known` [N, C + 1, H, W] is their known part, for a model that takes it.
    """
    count, overlap = windows(images.shape[2], images.shape[3], size), (size[0] // 2, size[1] // 2)
    conditioning = denoiser.conditioning(index, plan.labels, plan.settings.prompts)
    conditioning = conditioning.repeat(count)
    if known is not None:
        conditioning = replace(conditioning, known=inpainting.in_windows(known, size, overlap))
    denoise = denoiser.bind_conditioning(conditioning, plan.guidance)
    return denoise if count == 1 else inpainting.windowed(denoise, size, overlap)


def _noise(plan: SamplingPlan, index: Tensor, images: Tensor) -> Noise:
    shape = images.shape[1:]
    return lambda step: normal(plan.settings.seed, Purpose.SAMPLE_STEP, step, index, shape)
