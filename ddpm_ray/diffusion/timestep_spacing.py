"""The steps from T to 0 at which a sampler calls the network."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from ddpm_ray.diffusion.process import NoiseSchedule


def uniform_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 evenly spaced steps from T = num_steps to 0, as 1000, 500, 0 for a count of 2.

    (Song et al. 2021, appendix D.2, linear.) Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(num_steps * i // count for i in range(count, -1, -1))


def quadratic_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 steps from T = num_steps to 0, denser towards 0, as 1000, 250, 0 for a count of 2.

    Step i is T (i / count)^2 rounded down, or i where that would repeat a step (Song et al. 2021,
    appendix D.2, which takes it for CIFAR-10). Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(max(i, num_steps * i**2 // count**2) for i in range(count, -1, -1))


def noisiest_step(schedule: NoiseSchedule, sigma: float = 80.0) -> int:
    """The last step with sqrt(1 / alpha_bar - 1) of at most `sigma`; 1 if there is none.

    x_t is nearly pure noise there. Samplers that divide by alpha_bar start at this step (sigma_max
    of Karras et al. 2022, arXiv:2206.00364, table 1), since the cosine schedule ends at 20,000.
    """
    enough = 1 / (1 + sigma**2)
    return max(1, int((schedule.alpha_bar >= enough).sum()) - 1)


def log_snr_steps(schedule: NoiseSchedule, count: int, first: int | None = None) -> tuple[int, ...]:
    """count + 1 steps from T (or `first`) to 0, about evenly spaced in log-SNR down to t = 1.

    (Lu et al. 2022, arXiv:2206.00927, section 3.3, where lambda is half the log-SNR.) Steps that
    would coincide are moved to a neighbour. A log-SNR below -20, where x_t is pure noise, counts as
    -20. Raises ValueError unless count is in 1..T.
    """
    num_steps = first or schedule.num_steps
    _require_count(num_steps, count)
    # On the CPU for any device of the schedule: rounding must not change the steps.
    table = schedule.to("cpu").log_snr(torch.arange(1, num_steps + 1)).clamp(min=-20)  # decreasing
    wanted = torch.linspace(float(table[0]), float(table[-1]), count, dtype=torch.float64)
    nearest = (table[:, None] - wanted).abs().argmin(0).add(1).tolist()
    rising = [0]
    for i, t in enumerate(nearest, 1):  # keep the steps distinct and leave room for the rest
        rising.append(min(max(t, rising[-1] + 1), num_steps - (count - i)))
    rising[-1] = num_steps
    return tuple(reversed(rising))


def require_falling(steps: Sequence[int], num_steps: int | None = None) -> None:
    """Raises ValueError unless `steps` decreases strictly to 0, from at most T = num_steps."""
    if len(steps) < 2 or steps[-1] != 0:
        raise ValueError(f"steps are {_brief(steps)}; they must fall from at most T to 0")
    if num_steps is not None and steps[0] > num_steps:
        raise ValueError(f"steps start at {steps[0]}, but the schedule has T = {num_steps} steps")
    for t, s in pairwise(steps):
        if s >= t:
            raise ValueError(f"steps go from {t} to {s}; they must fall strictly, down to 0")


def _require_count(num_steps: int, count: int) -> None:
    if not 1 <= count <= num_steps:
        raise ValueError(f"{count} sampling steps of T = {num_steps}; take 1 to {num_steps}")


def _brief(steps: Sequence[int]) -> str:
    shown = [str(t) for t in steps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", *shown[-2:]]) or "empty"
