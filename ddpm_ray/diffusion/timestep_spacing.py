"""Which steps a sampler visits on its way from T to 0."""

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
    """The last step of a sigma = sqrt(1 / alpha_bar - 1) of at most that; 1 where none is.

    x there is as good as noise, and what divides by alpha_bar goes on from it (sigma_max of Karras
    et al. 2022, arXiv:2206.00364, table 1): the cosine schedule's own end is 20,000.
    """
    enough = 1 / (1 + sigma**2)
    return max(1, int((schedule.alpha_bar >= enough).sum()) - 1)


def log_snr_steps(schedule: NoiseSchedule, count: int, first: int | None = None) -> tuple[int, ...]:
    """count + 1 steps from T to 0 whose log-SNRs are about evenly spaced from t = T to t = 1.

    From `first` instead of T, where that is given.

    (Lu et al. 2022, arXiv:2206.00927, section 3.3: even in lambda, half the log-SNR.) Where two
    would be the same step, its neighbour is taken; steps noisier than a log-SNR of -20, which no
    image survives, count as that. Raises ValueError unless count is in 1..T.
    """
    num_steps = first or schedule.num_steps
    _require_count(num_steps, count)
    # On the CPU, wherever the schedule is: a rounding there must not choose another step.
    table = schedule.to("cpu").log_snr(torch.arange(1, num_steps + 1)).clamp(min=-20)  # falls
    wanted = torch.linspace(float(table[0]), float(table[-1]), count, dtype=torch.float64)
    nearest = (table[:, None] - wanted).abs().argmin(0).add(1).tolist()
    rising = [0]
    for i, t in enumerate(nearest, 1):  # at least one step apart, and room for those to come
        rising.append(min(max(t, rising[-1] + 1), num_steps - (count - i)))
    rising[-1] = num_steps
    return tuple(reversed(rising))


def require_falling(steps: Sequence[int], num_steps: int) -> None:
    """Raises ValueError unless `steps` falls strictly from at most T = num_steps to 0."""
    if len(steps) < 2 or steps[-1] != 0:
        raise ValueError(f"steps are {_brief(steps)}; they must fall from at most T to 0")
    if steps[0] > num_steps:
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
