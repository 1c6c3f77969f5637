"""Every knob of the diffusion itself: schedule, objective, sampling. See config.py for the rest."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.knobs import knob


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal[
        "linear", "scaled_linear", "constant", "one_over_t", "warmup",
        "cosine", "sigmoid", "laplace", "edm", "betas",
    ] = knob(
        "linear", "how beta grows with t; scaled_linear: its root linearly", defines_run=True
    )  # fmt: skip
    num_steps: int = knob(1000, "T, the diffusion steps", at_least=1, defines_run=True)
    beta_start: float = knob(
        1e-4, "both linear, warmup: beta_1", above=0, below=1, defines_run=True
    )
    beta_end: float = knob(
        0.02, "these and constant: beta_T", above=0, below=1, defines_run=True
    )  # fmt: skip
    rescale: bool = knob(
        False, "both linear: multiply beta by 1000/T, so that alpha_bar_T hardly depends on T",
        defines_run=True,
    )  # fmt: skip
    warmup_share: float = knob(
        0.1, "warmup: share of steps in which beta rises", above=0, at_most=1, defines_run=True
    )
    offset: float = knob(0.008, "cosine: s", at_least=0, defines_run=True)
    max_beta: float = knob(
        0.999, "cosine, sigmoid and laplace: cap of beta", above=0, below=1, defines_run=True
    )
    sigmoid_start: float = knob(-3.0, "sigmoid: where it is seen from, t = 0", defines_run=True)
    sigmoid_end: float = knob(3.0, "sigmoid: up to where, t = T", defines_run=True)
    sigmoid_tau: float = knob(1.0, "sigmoid: larger is straighter", above=0, defines_run=True)
    laplace_mean: float = knob(0.0, "laplace: log-SNR that is seen most", defines_run=True)
    laplace_scale: float = knob(0.5, "laplace: spread around it", above=0, defines_run=True)
    sigma_min: float = knob(0.002, "edm: noise over signal at t = 1", above=0, defines_run=True)
    sigma_max: float = knob(80.0, "edm: the same at t = T", above=0, defines_run=True)
    rho: float = knob(7.0, "edm: larger has more steps of little noise", above=0, defines_run=True)
    betas: tuple[float, ...] = knob(
        (), "betas: beta_1 to beta_T, of a YAML file for example", defines_run=True
    )
    zero_terminal_snr: bool = knob(
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
        if self.kind != "betas":
            if self.betas:
                yield (
                    f"schedule.betas holds {len(self.betas)} numbers and schedule.kind is "
                    f"{self.kind!r}, which does not read them; set schedule.kind=betas"
                )
            return
        if len(self.betas) != self.num_steps:
            yield (
                f"schedule.betas holds {len(self.betas)} numbers; it needs one for each of "
                f"schedule.num_steps {self.num_steps}"
            )
        wrong = next((i for i, b in enumerate(self.betas, 1) if not 0 < b < 1), 0)
        if wrong:
            yield (
                f"schedule.betas has {self.betas[wrong - 1]} at t = {wrong}; a variance lies in "
                f"(0, 1)"
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    prediction: Literal["epsilon", "x_0", "v", "mean", "score", "edm"] = knob(
        "epsilon", "what the network answers; edm: F of Karras et al. 2022", defines_run=True
    )
    sigma_data: float = knob(
        0.5, "edm, both: standard deviation of pixels in [-1, 1]", above=0, defines_run=True
    )
    variance: Literal["fixed", "learned", "learned_range"] = knob(
        "fixed", "of the reverse steps; learned: the network answers it too", defines_run=True
    )
    loss: Literal["simple", "hybrid", "vlb"] = knob(
        "simple", "squared error; plus vlb_weight times the bound; the bound", defines_run=True
    )
    vlb_weight: float = knob(
        0.001, "hybrid: of the bound beside the squared error", above=0, defines_run=True
    )
    weighting: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "uncertainty"] = knob(
        "unit", "of the squared error by t; edm: by sigma_data; uncertainty: learned beside",
        defines_run=True,
    )  # fmt: skip
    gamma: float = knob(
        5.0, "min_snr and soft_min_snr: the SNR up to which steps weigh alike", above=0,
        defines_run=True,
    )  # fmt: skip
    p2_gamma: float = knob(1.0, "p2: how much steps of little noise lose", defines_run=True)
    p2_k: float = knob(1.0, "p2: keeps the weight finite", above=0, defines_run=True)
    timesteps: Literal[
        "uniform", "low_discrepancy", "antithetic", "second_moment", "log_normal"
    ] = knob("uniform", "how t is drawn; second_moment: by the losses seen", defines_run=True)
    log_sigma_mean: float = knob(-1.2, "log_normal: mean of log sigma", defines_run=True)
    log_sigma_deviation: float = knob(1.2, "log_normal: its spread", above=0, defines_run=True)
    offset_noise: float = knob(
        0.0, "strength of noise that is one number per image and channel", at_least=0,
        defines_run=True,
    )  # fmt: skip
    input_perturbation: float = knob(
        0.0, "extra noise on the input, not in the target, over its own", at_least=0,
        defines_run=True,
    )  # fmt: skip
    label_dropout: float = knob(
        0.1, "with model.num_classes: share of images trained without their label",
        at_least=0, at_most=1, defines_run=True,
    )  # fmt: skip
    self_conditioning: bool = knob(
        False, "the network sees its own last estimate of x_0", defines_run=True
    )
    low_resolution_pixels: int = knob(
        0, "it sees the image at this size: super-resolution for a cascade; 0: not",
        at_least=0, defines_run=True,
    )  # fmt: skip
    low_resolution_noise: float = knob(
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


@dataclass(frozen=True)
class SamplingConfig:
    sampler: Literal[
        "ddim", "ancestral", "dpm_solver_pp", "dpm_solver_pp_sde", "unipc", "heun", "plms"
    ] = knob("ddim", "how images are drawn")
    steps: int = knob(50, "steps per image, at most T; heun calls the network twice", at_least=1)
    spacing: Literal["uniform", "quadratic", "log_snr"] = knob(
        "uniform", "of these steps over 0..T; log_snr: evenly in log-SNR"
    )
    eta: float = knob(0.0, "ddim: fresh noise, 0 none, 1 as ancestral", at_least=0, at_most=1)
    variance: Literal["fixed_small", "fixed_large", "learned"] = knob(
        "fixed_small", "of the fresh noise; learned: as the network answers it"
    )
    clip: bool = knob(True, "clip each estimate of x_0 to [-1, 1] and derive epsilon again")
    dynamic_quantile: float = knob(
        0.0, "clip each image to this quantile of its own |x_0| and rescale; 0: to [-1, 1]",
        at_least=0, at_most=1,
    )  # fmt: skip
    seed: int = knob(0, "with the image's index it fixes an image", at_least=0)
    batch_size: int = knob(64, "images in one network call", at_least=1)
    labels: tuple[int, ...] = knob(
        (), "classes to draw in turn; empty: all in turn, of a model that knows them"
    )
    guidance_scale: float = knob(
        1.0, "classifier-free guidance: 1 the class alone, above 1 more of it", at_least=0
    )
    guidance_rescale: float = knob(
        0.0, "share of guided contrast that is taken back", at_least=0, at_most=1
    )
    guidance_above_sigma: float = knob(0.0, "guide only at noise above this sigma", at_least=0)
    guidance_below_sigma: float = knob(
        0.0, "and below this one (sigma^2 = 1/alpha_bar - 1); 0: no end", at_least=0
    )

    def problems(self, prefix: str, num_steps: int | None = None) -> Iterator[str]:
        """Steps and variance that do not fit a model of T = `num_steps`, if that is known."""
        if num_steps is not None and 0 < num_steps < self.steps:
            yield (
                f"{prefix}.steps is {self.steps}; it cannot exceed schedule.num_steps {num_steps}"
            )
        partial = num_steps is not None and self.steps < num_steps
        if self.variance == "fixed_large" and partial:
            yield (
                f"{prefix}.variance is 'fixed_large', which at {self.steps} of {num_steps} steps "
                f"adds more noise than the next step expects (FID 367 at 10 steps: Song et al. "
                f"2021, table 1); use {prefix}.variance=fixed_small"
            )
        elif self.variance == "fixed_large" and self.sampler == "ddim" and self.eta != 1:
            yield (
                f"{prefix}.variance is 'fixed_large' and {prefix}.eta {self.eta}; that variance is "
                f"defined for eta=1 alone (Song et al. 2021, section 4.1): use fixed_small"
            )
        if self.variance == "learned" and self.sampler != "ancestral":
            yield (
                f"{prefix}.variance is 'learned' and {prefix}.sampler {self.sampler!r}, which has "
                f"no variance to learn: use {prefix}.sampler=ancestral or fixed_small"
            )
        if self.dynamic_quantile and not self.clip:
            yield (
                f"{prefix}.dynamic_quantile is {self.dynamic_quantile} and {prefix}.clip false; "
                f"it is a way to clip: set one of the two"
            )
        if 0 < self.guidance_below_sigma <= self.guidance_above_sigma:
            yield (
                f"{prefix}.guidance_below_sigma is {self.guidance_below_sigma}; it must lie above "
                f"{prefix}.guidance_above_sigma {self.guidance_above_sigma}"
            )

    def misfits(
        self, prefix: str, objective: ObjectiveConfig, num_classes: int, *, led: bool = False
    ) -> Iterator[str]:
        """What a model that was trained so cannot do: guide without labels, answer a variance.

        `led`: another network knows the labels.
        """
        if self.variance == "learned" and objective.variance == "fixed":
            yield (
                f"{prefix}.variance is 'learned', and the network answers none "
                f"(objective.variance=fixed): use {prefix}.variance=fixed_small"
            )
        if not num_classes and (self.guidance_scale != 1 or (self.labels and not led)):
            yield (
                f"{prefix}.guidance_scale is {self.guidance_scale:g} and {prefix}.labels "
                f"{list(self.labels)}, but the model is trained without labels "
                f"(model.num_classes=0): leave both as they are by default"
            )
        elif self.guidance_scale != 1 and not objective.label_dropout:
            yield (
                f"{prefix}.guidance_scale is {self.guidance_scale:g}, but no image was trained "
                f"without its label (objective.label_dropout=0): use {prefix}.guidance_scale=1"
            )
        if num_classes and (wrong := [k for k in self.labels if not 0 <= k < num_classes]):
            yield (
                f"{prefix}.labels has {wrong[0]}; the model knows 0 to {num_classes - 1} "
                f"(model.num_classes={num_classes})"
            )
