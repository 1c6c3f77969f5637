"""Draw the step t at which each image of a batch is trained.

t is a pure function of (seed, step, position in the global batch), so it does not depend on the
number of workers or on restarts. `positions` is int64 [B']; t is int64 of the same shape, on the
same device, in 1..T = num_steps. Probability tables are float64 [T+1], 0 at t = 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose, Step
from ddpm_ray.diffusion.process import NoiseSchedule

_GRID = 2**31  # number of values of a uniform draw


def uniform(seed: int, step: Step, positions: Tensor, num_steps: int) -> Tensor:
    """Uniform and independent t (Ho et al. 2020, algorithm 1)."""
    return 1 + counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions, num_steps)


def low_discrepancy(seed: int, step: Step, positions: Tensor, num_steps: int, batch: int) -> Tensor:
    """Low-discrepancy t: evenly spaced over 1..T with one random offset u per global batch.

    Position i gets the step that contains frac(u + i / batch) (Kingma et al. 2021,
    arXiv:2107.00630, appendix I.1), so each t alone is uniform. T times `batch` is at most 2^31.
    """
    cells = num_steps * batch  # u in units of 1 / cells; its position within a cell changes no t
    offset = counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions.new_zeros(()), cells)
    return 1 + (offset + positions * num_steps) % cells // batch


def antithetic(seed: int, step: Step, positions: Tensor, num_steps: int) -> Tensor:
    """Antithetic pairs: positions 2 i and 2 i + 1 get t and T + 1 - t; each t alone is uniform.

    (As in the authors' code of Song et al. 2021, arXiv:2010.02502.)
    """
    t = uniform(seed, step, positions // 2, num_steps)
    return torch.where(positions % 2 == 0, t, num_steps + 1 - t)


@dataclass(frozen=True)
class Distribution:
    """A distribution of t, prepared for draws on the device of its tensors."""

    cumulative: Tensor  # [T] float64: probability of a step of at most 1, 2, ... T
    weights: Tensor  # [T+1] float64: importance weights 1 / (T p_t)

    @classmethod
    def of(cls, probability: Tensor) -> "Distribution":
        """Prepare a table that has no negative entry and need not sum to 1, on its device."""
        below = _running_sum(probability[1:])
        return cls(below / below[-1], below[-1] / (len(below) * probability))

    def to(self, device: torch.device) -> "Distribution":
        """The same on `device`."""
        return Distribution(self.cumulative.to(device), self.weights.to(device))


def weighted(
    seed: int, step: Step, positions: Tensor, distribution: Distribution
) -> tuple[Tensor, Tensor]:
    """Draw t from `distribution`, on its device; also return the importance weights, float64.

    The expectation of weight times loss is the uniform mean of the loss over all t with p_t > 0.
    """
    draws = counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions, _GRID)
    place = (draws.double() + 0.5) / _GRID  # in (0, 1): float32 would round to both ends
    t = 1 + torch.searchsorted(distribution.cumulative, place)
    return t, distribution.weights[t]


def _running_sum(values: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... of `values` [n]."""
    if values.is_cpu:
        return values.cumsum(0)
    distance = 1  # by doubling: torch has no deterministic scan of floats on CUDA
    while distance < len(values):
        values = values + F.pad(values[:-distance], (distance, 0))
        distance *= 2
    return values


def log_normal(schedule: NoiseSchedule, mean: float = -1.2, deviation: float = 1.2) -> Tensor:
    """The table that makes log sigma normally distributed, truncated to the range of the schedule.

    sigma = sqrt((1 - a) / a) (Karras et al. 2022, arXiv:2206.00364, table 1: P_mean and P_std). The
    probability of a step is the density at its log sigma times the spacing of log sigma there. A
    step with a = 0 has an infinite log sigma and probability 0.
    """
    log_sigma = schedule.log_snr(torch.arange(1, schedule.num_steps + 1)).cpu() / -2
    log_sigma = log_sigma[log_sigma.isfinite()]
    alone = len(log_sigma) == 1
    spacing = torch.ones_like(log_sigma) if alone else torch.gradient(log_sigma)[0]
    log_density = ((log_sigma - mean) / deviation).square() / -2
    table = torch.zeros(schedule.num_steps + 1, dtype=torch.float64)
    table[1 : len(log_sigma) + 1] = torch.softmax(log_density + spacing.log(), 0)
    return table


HISTORY = 10  # number of losses stored for each step
UNIFORM_SHARE = 0.001  # share of the probability that stays uniform, so that no p_t is 0


@dataclass
class SecondMoments:
    """Loss-aware sampling of t: p_t proportional to sqrt(E[L_t^2]) of the last 10 losses at t.

    (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 18 and section 3.3: this minimises the variance
    of the estimated loss.) The copies of all workers stay equal if each is updated with the whole
    global batch. The host waits for none of its values.
    """

    losses: Tensor  # [T, 10] float64: a ring buffer for each step, t = 1 first
    counts: Tensor  # [T] int64: number of losses so far

    @classmethod
    def empty(cls, num_steps: int, device: torch.device | str = "cpu") -> "SecondMoments":
        """The state before the first update."""
        losses = torch.zeros(num_steps, HISTORY, dtype=torch.float64, device=device)
        return cls(losses, torch.zeros(num_steps, dtype=torch.int64, device=device))

    def update(self, t: Tensor, losses: Tensor, accepted: Tensor) -> None:
        """Add losses [B] at steps t [B], in the order of their positions; all on one device.

        `accepted`: bool []; nothing is added where it is false.
        """
        row, order = torch.sort(t - 1, stable=True)  # group by step and keep the order
        seen = torch.zeros_like(self.counts).index_add_(0, row, torch.ones_like(row))
        index = torch.arange(len(row), device=row.device)
        rank = index - (seen.cumsum(0) - seen)[row]  # index within its step
        kept = (rank >= seen[row] - HISTORY) & accepted  # so that each slot is written once
        slot = row * HISTORY + (self.counts[row] + rank) % HISTORY
        # One place more takes what is not kept: a choice by `kept` would make the host wait.
        slots = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        slots[torch.where(kept, slot, len(slots) - 1)] = losses.double()[order]
        self.losses.copy_(slots[:-1].view_as(self.losses))
        self.counts += seen * accepted

    def probability(self) -> Tensor:
        """The table [T+1] for `weighted`: uniform until every step has 10 losses.

        UNIFORM_SHARE of it always stays uniform, as in the authors' code.
        """
        size = self.losses.square().mean(1).sqrt()
        unknown = (self.counts < HISTORY).any() | ~size.any()
        size = torch.where(unknown, torch.ones_like(size), size)
        p = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE / len(size)
        return torch.cat([p.new_zeros(1), p])

    def state_dict(self) -> dict[str, Tensor]:
        """Both tables for a checkpoint, without copying."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tables of `state_dict` in place. Raises RuntimeError for another T."""
        for name, table in self.state_dict().items():
            table.copy_(state[name])
