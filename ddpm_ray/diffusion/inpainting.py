"""Images of which a part is given. The mask [B or 1, C or 1, ...] is 1 where a pixel is known.

`replacement` and `windowed` wrap a denoiser for any sampler. `repaint` is a sampler of its own: it
walks up as well, so that what it paints can still agree with what is known.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import Clip, X0Estimator, clip_to_range


def repaint(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    known: Tensor,
    mask: Tensor,
    noise: Callable[[int], Tensor],
    jump_length: int = 10,
    resamples: int = 10,
    eta: float = 1.0,
    parameterization: Parameterization | None = None,
    clip: Clip | None = clip_to_range,
) -> Tensor:
    """Images like x_T [B, ...] that are `known` [B, ...] exactly where `mask` is 1, painted to fit.

    (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1.) Each transition down is DDIM's of `eta`, 1
    being the paper's DDPM with `fixed_small`; its known pixels are drawn from q(x_s | known). The
    way is that of `jump_schedule`. noise(n), of x_T's shape, is for transition n of it, counted
    from 0, so an image is a function of (seed, its index) where the noise is; the last asks none. A
    learned variance is not read. `steps`, `parameterization` and `clip` are as in `ddim`. Raises
    ValueError for other `steps`, `eta`, jumps and for a mask that is not of 0 and 1.

    It finds the mode that the known part settles. Of modes that it leaves open the shares are not
    the posterior's, with many resamples less so: in a mixture 0.72 of one, where Bayes has 0.575.
    """
    require_falling(steps, schedule.num_steps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}; it lies between 0 (no noise) and 1 (as much as DDPM)")
    keep = _kept(mask)
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    x = x_T.detach().clone()
    x_0, at_s = torch.empty_like(x), torch.empty_like(x)
    estimate = X0Estimator(
        denoise, parameterization or Parameterization.of("epsilon", schedule), x, clip
    )
    with torch.inference_mode():
        for n, (t, s) in enumerate(pairwise(jump_schedule(steps, jump_length, resamples))):
            a, a_s = alpha_bar[t], alpha_bar[s]
            if s > t:  # q(x_s | x_t): all the jump's steps at once
                x.mul_(math.sqrt(a_s / a)).add_(noise(n), alpha=math.sqrt(1 - a_s / a))
                continue
            estimate.x_0(x, t, estimate.model_output(x, t)[:, : x.shape[1]], out=x_0)
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


def jump_schedule(steps: Sequence[int], jump_length: int, resamples: int) -> tuple[int, ...]:
    """The way down `steps` that jumps back up by `jump_length` of them, as 3, 2, 1, 2, 1, 0.

    From the last step above 0 and every `jump_length`-th before, if there is room, it jumps
    resamples - 1 times (Lugmayr et al. 2022, appendix B). Raises ValueError for either below 1.
    """
    if jump_length < 1 or resamples < 1:
        raise ValueError(
            f"jump_length is {jump_length} and resamples {resamples}; both are at least 1, and "
            "resamples=1 never jumps"
        )
    place, way = len(steps) - 1, [steps[0]]  # place: how many transitions from the image
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
    """`denoise` that answers, where `mask` is 1, with what stands for `known` [B, ...].

    In any sampler the known pixels then run from x_T to `known` as its own transitions from x_t
    to q(x_s | x_t, known) do; with DDIM or `fixed_small` they are draws of q(x_t | known) where
    x_T's are. The rest sees them, but they never wait for it: cheap, and worse than `repaint` (Song
    et al. 2021, arXiv:2011.13456, appendix I.2). Give the result to `paste`: rounding and clip.
    A clip to a quantile scales the whole image, so that the rest sees the known pixels nearer to 0.
    """
    keep = _kept(mask)

    def replaced(x_t: Tensor, t: Tensor) -> Tensor:
        model_output, count = denoise(x_t, t), x_t.shape[1]
        image = torch.where(
            keep, parameterization.output_from_x0(x_t, t, known), model_output[:, :count]
        )
        return torch.cat([image, model_output[:, count:]], 1)

    return replaced


def paste(result: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """`known` where `mask` is 1, to the bit, and `result` elsewhere, [B, ...]."""
    return torch.where(_kept(mask), known, result)


def on_canvas(image: Tensor, height: int, width: int, top: int, left: int) -> tuple[Tensor, Tensor]:
    """Canvas [B, C, height, width] with `image` [B, C, h, w] at (top, left), and its mask, bool.

    For outpainting. Raises ValueError unless the image lies on the canvas.
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


def windowed(denoise: Denoise, size: int, overlap: int) -> Denoise:
    """A denoiser of canvases: the mean of its answers to all windows of size x size, in one call.

    (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113, eq. 5 with equal weights.) Window k of
    image b is row k B + b of the call, so labels are repeated whole. Neighbours share at least
    `overlap` pixels. Raises ValueError unless 0 <= overlap < size, and for a smaller canvas.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap is {overlap} for windows of {size}; it lies from 0 to size - 1")

    def denoise_canvas(x_t: Tensor, t: Tensor) -> Tensor:
        """The mean answer [B, ..., H, W] to a canvas; ValueError where a window is larger."""
        rows, columns = (_starts(length, size, overlap) for length in x_t.shape[-2:])
        cuts = [(..., slice(i, i + size), slice(j, j + size)) for i in rows for j in columns]
        answers = denoise(torch.cat([x_t[cut] for cut in cuts]), t.repeat(len(cuts)))
        total = answers.new_zeros(len(x_t), answers.shape[1], *x_t.shape[-2:])
        seen = answers.new_zeros(x_t.shape[-2:])
        for cut, model_output in zip(cuts, answers.chunk(len(cuts)), strict=True):
            total[cut] += model_output
            seen[cut] += 1
        return total.div_(seen)

    return denoise_canvas


def sdedit(
    schedule: NoiseSchedule, image: Tensor, steps: Sequence[int], strength: float, noise: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """x_t of `image` [B, ...] and the `steps` left from there, t the last one at most strength T.

    A sampler that starts there repaints an image or a sketch; at strength 1 little of it is left
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
    """The largest |result - known| where `mask` is 1; 0 where nothing is known."""
    return float(torch.where(_kept(mask), (result - known).abs(), 0).max())


def seam(result: Tensor, mask: Tensor) -> Tensor:
    """How much neighbours [B, C, H, W] across the mask's edge differ, over those elsewhere, [B].

    Mean absolute differences; 1: no seam to be seen. NaN where there is no edge or nothing else.
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


def _starts(length: int, size: int, overlap: int) -> list[int]:
    if length < size:
        raise ValueError(f"the canvas is {length} long and a window {size}; take smaller windows")
    return [*range(0, length - size, size - overlap), length - size]
