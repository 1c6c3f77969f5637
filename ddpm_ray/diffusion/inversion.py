"""DDIM inversion and spherical interpolation of noise (Song et al. 2021, arXiv:2010.02502)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import X0Estimator


def ddim_inversion(
    estimate: X0Estimator,
    x_0: Tensor,
    steps: Sequence[int],
    *,
    iterations: int = 1,
) -> Tensor:
    """DDIM inversion: the noise x_T [B, ...] from which `samplers.ddim` reproduces images x_0.

    (Song et al. 2021, section 4.3.) For each transition from t to s it solves for the x_t that DDIM
    maps to x_s. The first iteration calls the network on x_s in place of x_t; more `iterations`, of
    one network call each, are fixed-point iterations on x_t until `ddim` reproduces the image to
    rounding. They converge if the model output changes slowly with x_t compared to the step. Give
    an estimator with clip=None, since clipped values cannot be recovered.

    `steps` decreases, as in `ddim`. Raises ValueError for other `steps`, for fewer than 1 iteration
    and for a single step from an alpha_bar of 0, where x_T is independent of the image.
    """
    schedule = estimate.schedule
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
    with torch.inference_mode():
        for s, t in pairwise(reversed(steps)):
            kept = sigma[s] / sigma[t]
            fresh = alpha[s] - kept * alpha[t]
            # Solve for x_t with the estimated noise held fixed if there is more image than
            # noise, else with the estimate of x_0 fixed: the fixed part then has less influence.
            mostly_image = alpha[t] * alpha[s] > sigma[t] * sigma[s]
            gain = alpha[t] / alpha[s] if mostly_image else sigma[t] / sigma[s]
            x_t.copy_(x_s)
            for _ in range(iterations):
                torch.mul(x_t, kept, out=ahead).add_(estimate(x_t, t, out=image), alpha=fresh)
                x_t.add_(x_s, alpha=gain).sub_(ahead, alpha=gain)
            x_s, x_t = x_t, x_s
    return x_s


def interpolate(x_a: Tensor, x_b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of noises [B, ...]: the point at `share` on the arc from x_a to x_b.

    It preserves the norm of Gaussian noise, which a linear interpolation would reduce (Song et al.
    2021, appendix D.5, eq. 67). The ends, at 0 and 1, are exact. Noises within 1e-6 of the same or
    of opposite directions, where the arc is ill-conditioned, are interpolated linearly. Raises
    ValueError for a share outside [0, 1] or other shapes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; it lies between 0 (x_a) and 1 (x_b)")
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a is {list(x_a.shape)} and x_b {list(x_b.shape)}; they must agree")
    a, b = (torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (x_a, x_b))
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))  # acos is inaccurate near 0
    sine = angle.sin()
    shares = torch.tensor([1 - share, share], dtype=torch.float64, device=x_a.device)[:, None]
    weights = torch.where(sine > 1e-6, (shares * angle).sin() / sine, shares)  # [2, B]
    of_a, of_b = weights.view(2, -1, *[1] * (x_a.ndim - 1)).to(x_a)
    between: Tensor = of_a * x_a + of_b * x_b
    return between
