"""Options of the noise schedule."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.option_fields import option
from ddpm_ray.redaction import counted


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule: how much noise x_t holds at each of the T steps."""

    kind: Literal[
        "linear",
        "scaled_linear",
        "constant",
        "one_over_t",
        "warmup",
        "cosine",
        "sigmoid",
        "laplace",
        "edm",
        "betas",
    ] = option(
        "linear", "noise schedule; scaled_linear: sqrt(beta) is linear in t", defines_run=True
    )
    num_steps: int = option(1000, "number of diffusion steps T", at_least=1, defines_run=True)
    beta_start: float = option(
        1e-4, "linear, scaled_linear, warmup: beta_1", above=0, below=1, defines_run=True
    )
    beta_end: float = option(
        0.02, "linear, scaled_linear, warmup, constant: beta_T", above=0, below=1, defines_run=True
    )
    rescale: bool = option(
        False,
        "linear, scaled_linear: multiply beta by 1000/T, so alpha_bar_T hardly depends on T",
        defines_run=True,
    )
    warmup_share: float = option(
        0.1,
        "warmup: fraction of the steps in which beta rises",
        above=0,
        at_most=1,
        defines_run=True,
    )
    offset: float = option(0.008, "cosine: offset s", at_least=0, defines_run=True)
    max_beta: float = option(
        0.999, "cosine, sigmoid, laplace: upper bound of beta", above=0, below=1, defines_run=True
    )
    sigmoid_start: float = option(
        -3.0, "sigmoid: argument of the sigmoid at t = 0", defines_run=True
    )
    sigmoid_end: float = option(3.0, "sigmoid: argument of the sigmoid at t = T", defines_run=True)
    sigmoid_tau: float = option(
        1.0, "sigmoid: temperature; larger: closer to linear", above=0, defines_run=True
    )
    laplace_mean: float = option(0.0, "laplace: mean of the log-SNR distribution", defines_run=True)
    laplace_scale: float = option(
        0.5, "laplace: scale of the log-SNR distribution", above=0, defines_run=True
    )
    sigma_min: float = option(
        0.002, "edm: sigma at t = 1, the ratio of noise to signal", above=0, defines_run=True
    )
    sigma_max: float = option(80.0, "edm: sigma at t = T, likewise", above=0, defines_run=True)
    rho: float = option(
        7.0,
        "edm: exponent of the steps; a larger one puts more at low noise",
        above=0,
        defines_run=True,
    )
    betas: tuple[float, ...] = option(
        (), "betas: the list of beta_1 to beta_T, usually from a YAML file", defines_run=True
    )
    zero_terminal_snr: bool = option(
        False, "rescale sqrt(alpha_bar) to 0 at t = T, so that x_T is pure noise", defines_run=True
    )

    def problems(self) -> Iterator[str]:
        """Yield a line for parameters that do not make a valid schedule."""
        if self.beta_start > self.beta_end:
            yield (
                f"schedule.beta_start is {self.beta_start}, above schedule.beta_end "
                f"{self.beta_end}; noise must grow with t: swap them"
            )
        scale = 1000 / max(self.num_steps, 1) if self.rescale else 1.0
        for low, high in (("sigmoid_start", "sigmoid_end"), ("sigma_min", "sigma_max")):
            if getattr(self, low) >= getattr(self, high):
                yield (
                    f"schedule.{low} is {getattr(self, low)}; it must lie below "
                    f"schedule.{high} {getattr(self, high)}"
                )
        linear = self.kind in ("linear", "scaled_linear")
        if linear and self.beta_end < 1 <= self.beta_end * scale:
            yield (
                f"schedule.num_steps is {self.num_steps}: rescaled by 1000/T, schedule.beta_end "
                f"becomes {self.beta_end * scale:.3g} and must be below 1; use at least "
                f"{math.floor(1000 * self.beta_end) + 1} steps or schedule.rescale=false"
            )
        yield from self._betas_problems()

    def _betas_problems(self) -> Iterator[str]:
        holds = f"schedule.betas holds {counted(len(self.betas), 'number')}"
        if self.kind != "betas":
            if self.betas:
                yield (
                    f"{holds} and schedule.kind is {self.kind!r}, which does not read "
                    f"them; set schedule.kind=betas"
                )
            return
        if len(self.betas) != self.num_steps:
            yield (f"{holds}; it needs one for each of schedule.num_steps {self.num_steps}")
        wrong = next((i for i, b in enumerate(self.betas, 1) if not 0 < b < 1), 0)
        if wrong:
            yield (
                f"schedule.betas has {self.betas[wrong - 1]} at t = {wrong}; a variance lies in "
                f"(0, 1)"
            )
