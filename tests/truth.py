"""Data whose every law is known in closed form: a mixture of Gaussians.

Under noise a mixture stays one: component k of x_t is N(sqrt(a) m_k, a v_k + 1 - a), a = alpha_bar.
So the expected noise given x_t, which is what training seeks, has a closed form, and so have the
score, the density and what is left of the law where part of x_0 is known.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, schedules

SCHEDULE = NoiseSchedule(schedules.cosine(1000))


@dataclass(frozen=True, eq=False)
class Mixture:
    """K Gaussians in D dimensions with diagonal covariances; all float64. a is [B or 1, 1, 1]."""

    weight: Tensor  # [K]
    mean: Tensor  # [K, D]
    variance: Tensor  # [K, D]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        return self.mean[k] + self.variance[k].sqrt() * standard(count, generator, like=self)

    def component(self, x: Tensor, a: Tensor) -> Tensor:
        """The probability [B, K] of each component, given x_t = x [B, D]."""
        return torch.softmax(self.log_joint(x, a), 1)

    def density(self, x: Tensor, a: Tensor) -> Tensor:
        """That of x_t at x [B, D], as [B]."""
        return self.log_joint(x, a).exp().sum(1)

    def expected_noise(self, x: Tensor, t: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
        """E[epsilon | x_t = x], [B, D]: the optimal denoiser."""
        a = schedule.alpha_bar[t].view(-1, 1, 1)
        each = (1 - a).sqrt() * (x[:, None] - a.sqrt() * self.mean) / (a * self.variance + 1 - a)
        return (self.component(x, a)[..., None] * each).sum(1)

    def expected_image(self, x: Tensor, t: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
        """E[x_0 | x_t = x], [B, D]; also where x_t is nothing but noise."""
        a = schedule.alpha_bar[t].view(-1, 1, 1)
        gain = a.sqrt() * self.variance / (a * self.variance + 1 - a)
        each = self.mean + gain * (x[:, None] - a.sqrt() * self.mean)
        return (self.component(x, a)[..., None] * each).sum(1)

    def score(self, x: Tensor, a: Tensor) -> Tensor:
        """The gradient of log density(x, a), [B, D]."""
        each = (a.sqrt() * self.mean - x[:, None]) / (a * self.variance + 1 - a)
        return (self.component(x, a)[..., None] * each).sum(1)

    def log_joint(self, x: Tensor, a: Tensor) -> Tensor:
        spread = a * self.variance + 1 - a
        square = (x[:, None] - a.sqrt() * self.mean).square() / spread
        log_density: Tensor = -(square + (2 * math.pi * spread).log()).sum(-1) / 2
        return self.weight.log() + log_density


def standard(count: int, generator: torch.Generator, like: Mixture) -> Tensor:
    return torch.randn(count, like.mean.shape[1], dtype=torch.float64, generator=generator)


def mixture(weight: list[float], mean: list[list[float]], deviation: list[list[float]]) -> Mixture:
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weight, mean, deviation))
    return Mixture(w, m, s.square())


THREE = mixture([0.5, 0.3, 0.2], [[-2, 0], [1, 1.5], [2, -2]], [[0.4, 0.2], [0.3, 0.5], [0.1, 0.3]])
LINE = mixture([0.7, 0.3], [[-1], [1.5]], [[0.5], [0.2]])
ONE = mixture([1.0], [[0.6]], [[0.3]])
CLEAN = torch.ones(1, 1, 1, dtype=torch.float64)  # alpha_bar at step 0
