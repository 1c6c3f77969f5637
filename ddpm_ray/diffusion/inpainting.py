"""Inpainting, outpainting and SDEdit. The mask [B or 1, C or 1, ...] is 1 where a pixel is known.

`replacement` and `windowed` wrap a denoiser for any sampler. `repaint` is a sampler that also jumps
back to noisier steps, so that the repainted part becomes consistent with the known part.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import EllipsisType

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import X0Estimator


def repaint(
    estimate: X0Estimator,
    x_T: Tensor,
    walk: Sequence[int],
    *,
    known: Tensor,
    mask: Tensor,
    noise: Callable[[int], Tensor],
    eta: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """RePaint: images like x_T [B, ...], equal to `known` [B, ...] where `mask` is 1.

    (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1.) Each denoising transition is DDIM's with
    `eta`, where 1 is the paper's DDPM with `fixed_small`; known pixels are drawn from q(x_s |
    known). `walk` is a sequence of steps from `jump_schedule`. noise(n), shaped like x_T, is the
    noise of transition n, counted from 0; the last one needs none. A learned variance is ignored.
    `on_step` is called before each denoising transition.
    Raises ValueError for a walk that does not start at T or below and end at 0, for an invalid
    `eta` and for mask values other than 0 and 1.

    If the known part determines the mode, it is found. If several modes remain, their frequencies
    differ from the posterior's, the more so with many resamples: 0.72 for one mode of a mixture in
    which its posterior probability is 0.575.
    """
    schedule = estimate.schedule
    require_falling((max(walk), walk[-1]), schedule.num_steps)  # jump_schedule checks the others
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}; it lies between 0 (no noise) and 1 (as much as DDPM)")
    keep = _kept(mask)
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    x = x_T.detach().clone()
    x_0, at_s = torch.empty_like(x), torch.empty_like(x)
    with torch.inference_mode():
        for n, (t, s) in enumerate(pairwise(walk)):
            a, a_s = alpha_bar[t], alpha_bar[s]
            if s > t:  # q(x_s | x_t): all the jump's steps at once
                x.mul_(math.sqrt(a_s / a)).add_(noise(n), alpha=math.sqrt(1 - a_s / a))
                continue
            estimate.x_0(x, t, estimate.model_output(x, t)[:, : x.shape[1]], out=x_0)
            if on_step is not None:
                on_step(t, x, x_0)
            sigma = eta * math.sqrt((1 - a / a_s) * (1 - a_s) / (1 - a))
            direction = math.sqrt(1 - a_s - sigma**2) / math.sqrt(1 - a)
            x.mul_(direction).add_(x_0, alpha=math.sqrt(a_s) - direction * math.sqrt(a))
            torch.mul(known, math.sqrt(a_s), out=at_s)
            if s > 0:  # a pixel is known or not, so one draw serves both
                fresh = noise(n)
                x.add_(fresh, alpha=sigma)
                at_s.add_(fresh, alpha=math.sqrt(1 - a_s))
            torch.where(keep, at_s, x, out=x)
    return x


def jump_schedule(
    steps: Sequence[int], jump_length: int = 10, resamples: int = 10
) -> tuple[int, ...]:
    """The sequence of `steps` with jumps back by `jump_length` of them, as 3, 2, 1, 2, 1, 0.

    At the last step above 0 and every `jump_length`-th before it, if there is room, it jumps back
    resamples - 1 times (Lugmayr et al. 2022, appendix B). Raises ValueError for either below 1 and
    for `steps` that do not fall strictly to 0.
    """
    require_falling(steps)
    if jump_length < 1 or resamples < 1:
        raise ValueError(
            f"jump_length is {jump_length} and resamples {resamples}; both are at least 1, and "
            "resamples=1 never jumps"
        )
    place, way = len(steps) - 1, [steps[0]]  # place: number of transitions left
    left = dict.fromkeys(range(1, place - jump_length + 1, jump_length), resamples - 1)
    while place > 0:
        up = left.get(place, 0) > 0
        if up:
            left[place] -= 1
        place += jump_length if up else -1
        way.append(steps[-1 - place])
    return tuple(way)


def replacement(
    denoise: Denoise, parameterization: Parameterization, known: Tensor, mask: Tensor
) -> Denoise:
    """Replace the output of `denoise` where `mask` is 1 by the one that corresponds to `known`.

    In any sampler the known pixels then end at `known` [B, ...]; with DDIM or `fixed_small` they
    are draws of q(x_t | known) at each step if those of x_T are. The repainted part adapts to the
    known part but not the other way round: cheaper and worse than `repaint` (Song et al. 2021,
    arXiv:2011.13456, appendix I.2). Pass the final images to `paste`, which removes the effects of
    rounding and clip. A clip to a quantile scales known pixels as well, towards 0.
    """
    keep = _kept(mask)

    def replaced(x_t: Tensor, t: Tensor) -> Tensor:
        """The output of `denoise`, replaced where the mask is 1; a learned variance is kept."""
        model_output, count = denoise(x_t, t), x_t.shape[1]
        image = torch.where(
            keep, parameterization.output_from_x0(x_t, t, known), model_output[:, :count]
        )
        return torch.cat([image, model_output[:, count:]], 1)

    return replaced


def paste(result: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """`known` (bit-identical) where `mask` is 1 and `result` elsewhere, [B, ...]."""
    return torch.where(_kept(mask), known, result)


def on_canvas(image: Tensor, height: int, width: int, top: int, left: int) -> tuple[Tensor, Tensor]:
    """Place `image` [B, C, h, w] at (top, left) of a canvas [B, C, height, width], for outpainting.

    Also returns the bool mask of known pixels. Raises ValueError unless the image fits.
    """
    h, w = image.shape[-2:]
    if not (0 <= top <= height - h and 0 <= left <= width - w):
        raise ValueError(
            f"an image of {h} x {w} at ({top}, {left}) is not within {height} x {width}; enlarge "
            "the canvas or move the image"
        )
    known = image.new_zeros(*image.shape[:2], height, width)
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool, device=image.device)
    known[..., top : top + h, left : left + w] = image
    mask[..., top : top + h, left : left + w] = True
    return known, mask


def windowed(denoise: Denoise, size: tuple[int, int], overlap: tuple[int, int]) -> Denoise:
    """Denoise larger images in windows of `size` (H, W): the mean of the outputs, in one call.

    (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113, eq. 5 with equal weights.) Window k of
    image b is row k B + b of the call, so repeat the conditioning as a whole. Neighbouring windows
    share at least `overlap` pixels. Raises ValueError unless 0 <= overlap < size, and for a smaller
    canvas.
    """
    if not all(0 <= shared < side for shared, side in zip(overlap, size, strict=True)):
        raise ValueError(f"overlap is {overlap} for windows of {size}; it lies from 0 to size - 1")

    def denoise_canvas(x_t: Tensor, t: Tensor) -> Tensor:
        """The mean output [B, ..., H, W]. Raises ValueError for an image smaller than a window."""
        cuts = _cuts(x_t, size, overlap)
        outputs = denoise(in_windows(x_t, size, overlap), t.repeat(len(cuts)))
        total = outputs.new_zeros(len(x_t), outputs.shape[1], *x_t.shape[-2:])
        seen = outputs.new_zeros(x_t.shape[-2:])
        for cut, model_output in zip(cuts, outputs.chunk(len(cuts)), strict=True):
            total[cut] += model_output
            seen[cut] += 1
        return total.div_(seen)

    return denoise_canvas


def in_windows(images: Tensor, size: tuple[int, int], overlap: tuple[int, int]) -> Tensor:
    """Cut images [B, C, H, W] into windows of `size`: window k of image b is row k B + b."""
    return torch.cat([images[cut] for cut in _cuts(images, size, overlap)])


def _cuts(
    images: Tensor, size: tuple[int, int], overlap: tuple[int, int]
) -> list[tuple[EllipsisType, slice, slice]]:
    rows, columns = map(window_starts, images.shape[-2:], size, overlap)
    height, width = size
    return [(..., slice(i, i + height), slice(j, j + width)) for i in rows for j in columns]


def sdedit(
    schedule: NoiseSchedule, image: Tensor, steps: Sequence[int], strength: float, noise: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """SDEdit: noise `image` [B, ...] to t, the first of `steps` of at most strength T.

    Returns x_t and the remaining steps, for a sampler. At strength 1 little of the image is left
    (Meng et al. 2022, arXiv:2108.01073, algorithm 1). Raises ValueError where no step is left.
    """
    left = tuple(t for t in steps if t <= round(strength * schedule.num_steps))
    if len(left) < 2 or strength > 1:
        raise ValueError(
            f"strength is {strength:g}; it lies in (0, 1], and a step must lie in 1..strength T: "
            "raise it or take more steps"
        )
    return add_noise(schedule, image, image.new_full((len(image),), left[0]).long(), noise), left


def known_error(result: Tensor, known: Tensor, mask: Tensor) -> float:
    """The largest |result - known| where `mask` is 1; 0 if no pixel is known."""
    return float(torch.where(_kept(mask), (result - known).abs(), 0).max())


def seam(result: Tensor, mask: Tensor) -> Tensor:
    """Visibility of the mask's edge [B]: differences across it relative to those elsewhere.

    Mean absolute differences of neighbouring pixels [B, C, H, W]; 1: invisible. NaN if there are no
    pixel pairs across the edge, or none elsewhere.
    """
    keep = _kept(mask).expand_as(result)
    step = torch.cat([result.diff(dim=axis).abs().flatten(1) for axis in (2, 3)], 1)
    edge = torch.cat([keep.diff(dim=axis).flatten(1) for axis in (2, 3)], 1)
    across, elsewhere = ((step * part).sum(1) / part.sum(1) for part in (edge, ~edge))
    return across / elsewhere


def _kept(mask: Tensor) -> Tensor:
    keep = mask.bool()
    if not torch.equal(keep.to(mask), mask):
        raise ValueError("mask has other values than 0 and 1, where 1 is a known pixel; round it")
    return keep


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Starts of windows of `size` that cover 0..length and share at least `overlap`."""
    if length < size:
        raise ValueError(f"the canvas is {length} long and a window {size}; take smaller windows")
    return [*range(0, length - size, size - overlap), length - size]
