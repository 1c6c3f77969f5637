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
        "linear", "how beta grows with t; scaled_linear: its root linearly", defines_run=True
    )  # fmt: skip
    num_steps: int = option(1000, "T, the diffusion steps", at_least=1, defines_run=True)
    beta_start: float = option(
        1e-4, "both linear, warmup: beta_1", above=0, below=1, defines_run=True
    )
    beta_end: float = option(
        0.02, "these and constant: beta_T", above=0, below=1, defines_run=True
    )  # fmt: skip
    rescale: bool = option(
        False, "both linear: multiply beta by 1000/T, so that alpha_bar_T hardly depends on T",
        defines_run=True,
    )  # fmt: skip
    warmup_share: float = option(
        0.1, "warmup: share of steps in which beta rises", above=0, at_most=1, defines_run=True
    )
    offset: float = option(0.008, "cosine: s", at_least=0, defines_run=True)
    max_beta: float = option(
        0.999, "cosine, sigmoid and laplace: cap of beta", above=0, below=1, defines_run=True
    )
    sigmoid_start: float = option(-3.0, "sigmoid: where it is seen from, t = 0", defines_run=True)
    sigmoid_end: float = option(3.0, "sigmoid: up to where, t = T", defines_run=True)
    sigmoid_tau: float = option(1.0, "sigmoid: larger is straighter", above=0, defines_run=True)
    laplace_mean: float = option(0.0, "laplace: log-SNR that is seen most", defines_run=True)
    laplace_scale: float = option(0.5, "laplace: spread around it", above=0, defines_run=True)
    sigma_min: float = option(0.002, "edm: noise over signal at t = 1", above=0, defines_run=True)
    sigma_max: float = option(80.0, "edm: the same at t = T", above=0, defines_run=True)
    rho: float = option(
        7.0, "edm: larger has more steps of little noise", above=0, defines_run=True
    )
    betas: tuple[float, ...] = option(
        (), "betas: beta_1 to beta_T, of a YAML file for example", defines_run=True
    )
    zero_terminal_snr: bool = option(
        False, "shift and scale the roots of alpha_bar so that x_T is pure noise", defines_run=True
    )

    def problems(self) -> Iterator[str]:
        """Numbers that make no schedule."""
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
        "epsilon", "what the network answers; edm: F of Karras et al. 2022", defines_run=True
    )
    sigma_data: float = option(
        0.5, "edm, both: standard deviation of pixels in [-1, 1]", above=0, defines_run=True
    )
    variance: Literal["fixed", "learned", "learned_range"] = option(
        "fixed", "of the reverse steps; learned: the network answers it too", defines_run=True
    )
    loss: Literal["simple", "hybrid", "vlb"] = option(
        "simple", "squared error; plus vlb_weight times the bound; the bound", defines_run=True
    )
    vlb_weight: float = option(
        0.001, "hybrid: of the bound beside the squared error", above=0, defines_run=True
    )
    weighting: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "uncertainty"] = option(
        "unit", "of the squared error by t; edm: by sigma_data; uncertainty: learned beside",
        defines_run=True,
    )  # fmt: skip
    gamma: float = option(
        5.0, "min_snr and soft_min_snr: the SNR up to which steps weigh alike", above=0,
        defines_run=True,
    )  # fmt: skip
    p2_gamma: float = option(1.0, "p2: how much steps of little noise lose", defines_run=True)
    p2_k: float = option(1.0, "p2: keeps the weight finite", above=0, defines_run=True)
    timesteps: Literal[
        "uniform", "low_discrepancy", "antithetic", "second_moment", "log_normal"
    ] = option(
        "uniform",
        "how t is drawn; second_moment: by the losses seen; train/loss is a mean over these t",
        defines_run=True,
    )
    log_sigma_mean: float = option(-1.2, "log_normal: mean of log sigma", defines_run=True)
    log_sigma_deviation: float = option(1.2, "log_normal: its spread", above=0, defines_run=True)
    offset_noise: float = option(
        0.0, "strength of noise that is one number per image and channel", at_least=0,
        defines_run=True,
    )  # fmt: skip
    input_perturbation: float = option(
        0.0, "extra noise on the input, not in the target, over its own", at_least=0,
        defines_run=True,
    )  # fmt: skip
    label_dropout: float = option(
        0.1, "with model.num_classes: share of images trained without their label",
        at_least=0, at_most=1, defines_run=True,
    )  # fmt: skip
    self_conditioning: bool = option(
        False, "the network sees its own last estimate of x_0", defines_run=True
    )
    low_resolution_pixels: int = option(
        0, "it sees the image at this size: super-resolution for a cascade; 0: not",
        at_least=0, defines_run=True,
    )  # fmt: skip
    low_resolution_noise: float = option(
        0.0, "standard deviation of noise on that image", at_least=0, defines_run=True
    )

    def problems(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Choices that contradict each other, or leave a step without anything to learn."""
        learns = self.variance != "fixed"
        silent = schedule.zero_terminal_snr or schedule.kind == "one_over_t"
        if silent and self.prediction in ("epsilon", "score"):
            yield (
                f"objective.prediction is {self.prediction!r} and the schedule leaves no signal at "
                f"t = T, where the noise says nothing of the image (Lin et al. 2023): use "
                f"objective.prediction=v"
            )
        if silent and self.weighting in ("min_snr", "soft_min_snr", "p2"):
            yield (
                f"objective.weighting is {self.weighting!r} and the schedule leaves no signal at "
                f"t = T, which it would never train: use objective.weighting=unit"
            )
        if learns and self.loss == "simple":
            yield (
                f"objective.variance is {self.variance!r} and objective.loss 'simple', which does "
                f"not train it; use objective.loss=hybrid"
            )
        if self.loss != "simple" and not learns:
            yield (
                f"objective.loss is {self.loss!r} and objective.variance 'fixed'; of a fixed "
                f"variance the bound is a weighted squared error: use objective.variance="
                f"learned_range or objective.loss=simple"
            )
        if self.weighting != "unit" and self.loss != "simple":
            yield (
                f"objective.weighting is {self.weighting!r} and objective.loss {self.loss!r}; "
                f"weights are those of the squared error alone: use objective.loss=simple"
            )
        if self.timesteps == "second_moment" and self.loss == "simple":
            yield (
                "objective.timesteps is 'second_moment', which evens out the terms of the bound; "
                "with objective.loss=simple it would only weigh steps anew: use loss=vlb or hybrid"
            )
