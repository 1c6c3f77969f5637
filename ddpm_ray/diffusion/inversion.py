"""From images back to their noise, and between two noises (Song et al. 2021, arXiv:2010.02502)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import Clip, X0Estimator


def ddim_inversion(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Tensor,
    steps: Sequence[int],
    *,
    iterations: int = 1,
    parameterization: Parameterization | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """The noise x_T [B, ...] from which `samplers.ddim` with the same `steps` makes images x_0.

    (Song et al. 2021, section 4.3.) Each transition from t to s is undone: sought is the x_t that
    it takes to x_s. Where the network answers to x_t, x_s stands in for x_t at first; more
    `iterations` put the last result in its place, one network call each, until `ddim` gives back
    the image to rounding. They converge where the network changes slowly with x_t against the
    length of a step. A `clip` that acts loses what it cuts off, so none is made by default.

    `steps` falls, as in `ddim`. Raises ValueError for other `steps`, for fewer than 1 iteration and
    for a single step from an alpha_bar of 0, whose noise says nothing of the image.
    """
    require_falling(steps, schedule.num_steps)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; take at least 1 a step")
    alpha: list[float] = schedule.alpha_bar.sqrt().tolist()
    sigma: list[float] = (1 - schedule.alpha_bar).sqrt().tolist()
    if alpha[steps[0]] == 0 and len(steps) == 2:
        raise ValueError(
            f"steps are {steps[0]}, 0 and alpha_bar is 0 at {steps[0]}: every noise gives the same "
            "image in one step; take more steps"
        )
    x_s = x_0.detach().clone()
    x_t, image, ahead = (torch.empty_like(x_s) for _ in range(3))
    estimate = X0Estimator(
        denoise, parameterization or Parameterization.of("epsilon", schedule), x_s, clip
    )
    with torch.inference_mode():
        for s, t in pairwise(reversed(steps)):
            kept = sigma[s] / sigma[t]
            fresh = alpha[s] - kept * alpha[t]
            # Solved for x_t with the noise that the network sees held still where there is more
            # image than noise, else with its image: what is held then changes x_t the least.
            mostly_image = alpha[t] * alpha[s] > sigma[t] * sigma[s]
            gain = alpha[t] / alpha[s] if mostly_image else sigma[t] / sigma[s]
            x_t.copy_(x_s)
            for _ in range(iterations):
                torch.mul(x_t, kept, out=ahead).add_(estimate(x_t, t, out=image), alpha=fresh)
                x_t.add_(x_s, alpha=gain).sub_(ahead, alpha=gain)
            x_s, x_t = x_t, x_s
    return x_s


def interpolate(x_a: Tensor, x_b: Tensor, share: float) -> Tensor:
    """The noise [B, ...] at `share` of the way on the arc from x_a to x_b, each image on its own.

    Spherical: independent standard normal noises of many pixels stay so, which a straight line
    would make too small (Song et al. 2021, appendix D.5, eq. 67). The ends, at 0 and 1, are exact.
    Noises within 1e-6 of the same or of opposite directions have no arc that rounding would leave;
    between them the way is straight. Raises ValueError for a share outside [0, 1] or other shapes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; it lies between 0 (x_a) and 1 (x_b)")
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a is {list(x_a.shape)} and x_b {list(x_b.shape)}; they must agree")
    a, b = (torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (x_a, x_b))
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))  # acos is blind near 0
    sine = angle.sin()
    shares = torch.tensor([1 - share, share], dtype=torch.float64, device=x_a.device)[:, None]
    weights = torch.where(sine > 1e-6, (shares * angle).sin() / sine, shares)  # [2, B]
    of_a, of_b = weights.view(2, -1, *[1] * (x_a.ndim - 1)).to(x_a)
    between: Tensor = of_a * x_a + of_b * x_b
    return between
