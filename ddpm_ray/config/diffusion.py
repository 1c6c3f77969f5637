"""Options of the diffusion process: noise schedule and training objective.

The sampling options are in config/sampling.py, because the Python API uses them too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.loading import option
from ddpm_ray.config.sampling import SamplingConfig as SamplingConfig
from ddpm_ray.redaction import counted


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal[
        "linear", "scaled_linear", "constant", "one_over_t", "warmup",
        "cosine", "sigmoid", "laplace", "edm", "betas",
    ] = option(
        "linear", "noise schedule; scaled_linear: sqrt(beta) is linear in t", defines_run=True
    )  # fmt: skip
    num_steps: int = option(1000, "number of diffusion steps T", at_least=1, defines_run=True)
    beta_start: float = option(
        1e-4, "linear, scaled_linear, warmup: beta_1", above=0, below=1, defines_run=True
    )
    beta_end: float = option(
        0.02, "linear, scaled_linear, warmup, constant: beta_T", above=0, below=1, defines_run=True
    )  # fmt: skip
    rescale: bool = option(
        False, "linear, scaled_linear: multiply beta by 1000/T, so alpha_bar_T hardly depends on T",
        defines_run=True,
    )  # fmt: skip
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
        0.002, "edm: sigma at t = 1 (noise over signal)", above=0, defines_run=True
    )
    sigma_max: float = option(80.0, "edm: sigma at t = T", above=0, defines_run=True)
    rho: float = option(7.0, "edm: larger: more steps at low noise", above=0, defines_run=True)
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


@dataclass(frozen=True)
class ObjectiveConfig:
    prediction: Literal["epsilon", "x_0", "v", "mean", "score", "edm"] = option(
        "epsilon",
        "prediction target of the network; edm: F of Karras et al. 2022",
        defines_run=True,
    )
    sigma_data: float = option(
        0.5,
        "prediction=edm, weighting=edm: standard deviation of pixels in [-1, 1]",
        above=0,
        defines_run=True,
    )
    variance: Literal["fixed", "learned", "learned_range"] = option(
        "fixed", "reverse-process variance; learned: predicted by the network", defines_run=True
    )
    loss: Literal["simple", "hybrid", "vlb"] = option(
        "simple",
        "simple: squared error; vlb: variational bound; hybrid: simple + vlb_weight * vlb",
        defines_run=True,
    )
    vlb_weight: float = option(
        0.001, "hybrid: weight of the variational bound", above=0, defines_run=True
    )
    weighting: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "uncertainty"] = option(
        "unit", "loss weight by t; edm: uses sigma_data; uncertainty: learned with the network",
        defines_run=True,
    )  # fmt: skip
    gamma: float = option(
        5.0, "min_snr, soft_min_snr: SNR at which the weight is clipped", above=0,
        defines_run=True,
    )  # fmt: skip
    p2_gamma: float = option(
        1.0, "p2: exponent; larger: lower weight at low noise", defines_run=True
    )
    p2_k: float = option(1.0, "p2: constant added to the SNR", above=0, defines_run=True)
    timesteps: Literal[
        "uniform", "low_discrepancy", "antithetic", "second_moment", "log_normal"
    ] = option(
        "uniform",
        "distribution of training timesteps; second_moment: by past losses; changes train/loss",
        defines_run=True,
    )
    log_sigma_mean: float = option(-1.2, "log_normal: mean of log sigma", defines_run=True)
    log_sigma_deviation: float = option(
        1.2, "log_normal: standard deviation of log sigma", above=0, defines_run=True
    )
    offset_noise: float = option(
        0.0, "strength of additional noise that is constant per image and channel", at_least=0,
        defines_run=True,
    )  # fmt: skip
    input_perturbation: float = option(
        0.0, "strength of extra input noise that is not in the target", at_least=0,
        defines_run=True,
    )  # fmt: skip
    label_dropout: float = option(
        0.1, "model.num_classes > 0: fraction of images trained without label, for guidance",
        at_least=0, at_most=1, defines_run=True,
    )  # fmt: skip
    self_conditioning: bool = option(
        False, "condition the network on its previous estimate of x_0", defines_run=True
    )
    low_resolution_pixels: int = option(
        0, "condition on the image at this size in pixels, for super-resolution; 0: off",
        at_least=0, defines_run=True,
    )  # fmt: skip
    low_resolution_noise: float = option(
        0.0, "standard deviation of noise added to that image", at_least=0, defines_run=True
    )

    def problems(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Yield a line for choices that contradict each other or leave some t without signal."""
        learns = self.variance != "fixed"
        silent = schedule.zero_terminal_snr or schedule.kind == "one_over_t"
        if silent and self.prediction in ("epsilon", "score"):
            yield (
                f"objective.prediction is {self.prediction!r} and the schedule leaves no signal at "
                f"t = T, where x_0 cannot be derived from the noise (Lin et al. 2023): use "
                f"objective.prediction=v"
            )
        if silent and self.weighting in ("min_snr", "soft_min_snr", "p2"):
            yield (
                f"objective.weighting is {self.weighting!r} and the schedule leaves no signal at "
                f"t = T, whose loss weight would be 0: use objective.weighting=unit"
            )
        if learns and self.loss == "simple":
            yield (
                f"objective.variance is {self.variance!r} and objective.loss 'simple', which does "
                f"not train it; use objective.loss=hybrid"
            )
        if self.loss != "simple" and not learns:
            yield (
                f"objective.loss is {self.loss!r} and objective.variance 'fixed'; with a fixed "
                f"variance the bound is a weighted squared error: use objective.variance="
                f"learned_range or objective.loss=simple"
            )
        if self.weighting != "unit" and self.loss != "simple":
            yield (
                f"objective.weighting is {self.weighting!r} and objective.loss {self.loss!r}; "
                f"weights apply to the squared error only: use objective.loss=simple"
            )
        if self.timesteps == "second_moment" and self.loss == "simple":
            yield (
                "objective.timesteps is 'second_moment', which balances the terms of the bound; "
                "it has no use with objective.loss=simple: use loss=vlb or hybrid"
            )
