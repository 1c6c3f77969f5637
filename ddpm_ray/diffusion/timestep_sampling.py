"""Which step t each image of a batch is trained at.

A choice is a pure function of (seed, step, position in the global batch), so any division of the
batch among workers, and any restart, gives an image the same t. `positions` is int64 [B']; t is
int64 of the same shape and on the same device, in 1..T = num_steps. Tables of probabilities are
float64 [T+1] on the CPU, 0 at t = 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.diffusion.process import NoiseSchedule

_GRID = 2**31  # values of a uniform draw


def uniform(seed: int, step: int, positions: Tensor, num_steps: int) -> Tensor:
    """Each t as likely as any other, all independent (Ho et al. 2020, algorithm 1)."""
    return 1 + counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions, num_steps)


def low_discrepancy(seed: int, step: int, positions: Tensor, num_steps: int, batch: int) -> Tensor:
    """Evenly spread over 1..T: the offset alone is drawn, once for a batch of `batch` positions.

    Position i has the step in which frac(u + i / batch) falls (Kingma et al. 2021,
    arXiv:2107.00630, appendix I.1); alone, it has each t alike. T times `batch` is at most 2^31.
    """
    cells = num_steps * batch  # u in units of 1 / cells: where it lies within one changes no t
    offset = counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions.new_zeros(()), cells)
    return 1 + (offset + positions * num_steps) % cells // batch


def antithetic(seed: int, step: int, positions: Tensor, num_steps: int) -> Tensor:
    """Positions 2 i and 2 i + 1 have t and T + 1 - t: a clean and a noisy look, each t alike.

    (As the authors' code of Song et al. 2021, arXiv:2010.02502, pairs them.)
    """
    t = uniform(seed, step, positions // 2, num_steps)
    return torch.where(positions % 2 == 0, t, num_steps + 1 - t)


def weighted(seed: int, step: int, positions: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """t from a table of `probability`, and 1 / (T p_t), float64: what makes a mean unbiased.

    The mean over draws of that weight times a loss is the uniform mean over all t that can be
    drawn. The table has no negative entry and need not sum to 1.
    """
    below = probability[1:].cumsum(0)
    draws = counter_rng.uniform_int(seed, Purpose.TIMESTEP, step, positions, _GRID)
    place = (draws.double() + 0.5) / _GRID  # in (0, 1): float32 would round to both ends
    t = 1 + torch.searchsorted((below / below[-1]).to(place.device), place)
    weight = below[-1] / (len(below) * probability)
    return t, weight.to(t.device)[t]


def log_normal(schedule: NoiseSchedule, mean: float = -1.2, deviation: float = 1.2) -> Tensor:
    """A table that gives log sigma the normal law of that mean and deviation, cut at both ends.

    sigma = sqrt((1 - a) / a) (Karras et al. 2022, arXiv:2206.00364, table 1: P_mean and P_std); a
    step has the density at its log sigma times its share of the axis. One without any signal is
    at no finite place on it, so it has none.
    """
    log_sigma = schedule.log_snr(torch.arange(1, schedule.num_steps + 1)).cpu() / -2
    log_sigma = log_sigma[log_sigma.isfinite()]
    alone = len(log_sigma) == 1
    spacing = torch.ones_like(log_sigma) if alone else torch.gradient(log_sigma)[0]
    log_density = ((log_sigma - mean) / deviation).square() / -2
    table = torch.zeros(schedule.num_steps + 1, dtype=torch.float64)
    table[1 : len(log_sigma) + 1] = torch.softmax(log_density + spacing.log(), 0)
    return table


HISTORY = 10  # losses kept of each step
UNIFORM_SHARE = 0.001  # of the probability, so that no step is forgotten


@dataclass
class SecondMoments:
    """Draws t by the size of its losses: p_t as sqrt(E[L_t^2]), over the last 10 of each step.

    (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 18 and section 3.3: least variance of the
    estimated sum.) The workers' copies stay equal if all are told of the whole global batch.
    """

    losses: Tensor  # [T, 10] float64: a ring for each step, t = 1 first
    counts: Tensor  # [T] int64: losses seen of each step

    @classmethod
    def empty(cls, num_steps: int) -> "SecondMoments":
        """Nothing seen yet."""
        losses = torch.zeros(num_steps, HISTORY, dtype=torch.float64)
        return cls(losses, torch.zeros(num_steps, dtype=torch.int64))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Losses [B] seen at steps t [B], in the order of their positions; both on the CPU."""
        row, order = torch.sort(t - 1, stable=True)  # a step's losses together, in their order
        seen = torch.bincount(row, minlength=len(self.counts))
        rank = torch.arange(len(row)) - (seen.cumsum(0) - seen)[row]  # among those of its step
        kept = rank >= seen[row] - HISTORY  # so that each slot is written once
        slot = (self.counts[row] + rank) % HISTORY
        self.losses[row[kept], slot[kept]] = losses.double()[order][kept]
        self.counts += seen

    def probability(self) -> Tensor:
        """The table [T+1] for `weighted`: uniform until each step has been seen 10 times.

        A thousandth of it stays uniform, as in the authors' code.
        """
        size = self.losses.square().mean(1).sqrt()
        if (self.counts < HISTORY).any() or not size.any():
            size = torch.ones_like(size)
        p = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE / len(size)
        return torch.cat([p.new_zeros(1), p])

    def state_dict(self) -> dict[str, Tensor]:
        """Both tables, no copies, for a checkpoint."""
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from tables that `state_dict` gave, in place; RuntimeError for another T."""
        for name, table in self.state_dict().items():
            table.copy_(state[name])
