"""Parameterizations: the targets of a network, and conversions between them.

Each target is a linear combination of image and noise, u(t) x_0 + w(t) epsilon. So is x_t, and the
two determine both parts: with D = u sqrt(1 - a) - w sqrt(a) and a = alpha_bar at t,

    x_0     = (sqrt(1 - a) target - w x_t) / D
    epsilon = (u x_t - sqrt(a) target) / D

A parameterization is its two columns u and w; targets, conversions, sampler coefficients and loss
weights follow from them. Where D is 0 the model output does not determine the image: epsilon and
score at a step with alpha_bar = 0.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from ddpm_ray.choices import Prediction
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule


@dataclass(frozen=True, eq=False)
class Parameterization:
    """The target u x_0 + w epsilon under `schedule`."""

    schedule: NoiseSchedule
    u: Tensor  # [T+1] float64; not used at t = 0
    w: Tensor  # [T+1] float64
    c_in: Tensor | None = None  # [T+1] float64: scale of the network's input

    @classmethod
    def of(
        cls, kind: Prediction, schedule: NoiseSchedule, sigma_data: float = 0.5
    ) -> "Parameterization":
        """The parameterization `kind`; raises ValueError if it does not determine x_0 at t = T.

        epsilon: the noise (Ho et al. 2020, arXiv:2006.11239, eq. 12). x_0: the image. v: sqrt(a)
        epsilon - sqrt(1 - a) x_0 (Salimans and Ho 2022, arXiv:2202.00512, appendix D). mean: of
        q(x_{t-1} | x_t, x_0) (Ho et al., eq. 7 and 8). score: the gradient of log q(x_t | x_0),
        -epsilon / sqrt(1 - a) (Song et al. 2021, arXiv:2011.13456). edm: F of Karras et al. 2022
        (arXiv:2206.00364, eq. 7 and table 1) for data of standard deviation `sigma_data`, with
        sigma = sqrt((1 - a) / a) and their x equal to x_t / sqrt(a); at sigma_data = 1 it is -v.
        """
        a = schedule.alpha_bar
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        c_in = None
        match kind:
            case "epsilon":
                u, w = zero, one
            case "x_0":
                u, w = one, zero
            case "v":
                u, w = -(1 - a).sqrt(), a.sqrt()
            case "mean":
                before = torch.cat([a[:1], a[:-1]])  # at t - 1; t = 0 is not used
                kept = a / before
                toward_x_0 = before.sqrt() * (1 - kept) / (1 - a)
                keep_x_t = kept.sqrt() * (1 - before) / (1 - a)
                u, w = toward_x_0 + keep_x_t * a.sqrt(), keep_x_t * (1 - a).sqrt()
            case "score":
                u, w = zero, -1 / (1 - a).sqrt()
            case "edm":
                spread = (1 - a + a * sigma_data**2).sqrt()
                u, w = (1 - a).sqrt() / (sigma_data * spread), -sigma_data * a.sqrt() / spread
                c_in = 1 / spread  # scales the input to unit variance
            case _:
                assert_never(kind)
        made = cls(schedule, u, w, c_in)
        if made.determinant()[-1] == 0:
            raise ValueError(
                f"prediction is {kind!r}, which does not determine the image at t = T, where "
                "this schedule leaves no signal, alpha_bar = 0: predict v or x_0"
            )
        return made

    def scaled(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's input for x_t [B, ...]: c_in x_t for edm, else x_t."""
        return x_t if self.c_in is None else _over(self.c_in[t], x_t) * x_t

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The target [B, ...] of the model output at t [B] for x_t from x_0 and `noise`."""
        u, w = (_over(column[t], x_0) for column in (self.u, self.w))
        return u * x_0 + w * noise

    def x_0(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of x_0 [B, ...] from the model output for x_t at t [B] in 1..T."""
        of_x_t, of_output = (_over(column[t], x_t) for column in self.to_x_0())
        return of_x_t * x_t + of_output * model_output

    def noise(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of the noise [B, ...] from the model output for x_t at t [B] in 1..T."""
        a, d = self.schedule.alpha_bar[t], self.determinant()[t]
        of_x_t, of_output = _over(self.u[t] / d, x_t), _over(-a.sqrt() / d, x_t)
        return of_x_t * x_t + of_output * model_output

    def output_from_x0(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The model output [B, ...] that corresponds to x_0: the inverse of `x_0`."""
        of_x_t, of_output = self.to_x_0()
        return (x_0 - _over(of_x_t[t], x_t) * x_t) / _over(of_output[t], x_t)

    def to_x_0(self) -> tuple[Tensor, Tensor]:
        """Columns (p, q), [T+1] float64, with x_0 = p x_t + q model_output."""
        noise_share, d = (1 - self.schedule.alpha_bar).sqrt(), self.determinant()
        return -self.w / d, noise_share / d

    def determinant(self) -> Tensor:
        """D [T+1] float64: 0 where the model output does not determine x_0."""
        a = self.schedule.alpha_bar
        return self.u * (1 - a).sqrt() - self.w * a.sqrt()


def score(parameterization: Parameterization, denoise: Denoise, x_t: Tensor, t: Tensor) -> Tensor:
    """The network's estimate of the gradient of log q(x_t), [B, ...]: -epsilon / sqrt(1 - a).

    (Song et al. 2021, arXiv:2011.13456, section 3.2 and appendix C; Vincent 2011.) Exact if the
    model output is the expectation of its target, the minimum of the training loss.
    """
    noise = parameterization.noise(x_t, t, denoise(x_t, t))
    return noise / -(1 - parameterization.schedule.at(t, x_t)).sqrt().to(x_t)


def _over(column: Tensor, like: Tensor) -> Tensor:
    """Entries [B] of a column, in the dtype of `like` [B, ...] and shaped to broadcast over it."""
    return column.view(-1, *[1] * (like.ndim - 1)).to(like)
