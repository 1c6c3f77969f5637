"""Options of the training objective: what the network predicts, the loss and its inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ddpm_ray.choices import ModelVariance, Prediction
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.schedule import ScheduleConfig

Loss: TypeAlias = Literal["simple", "hybrid", "vlb"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Training objective: what the network predicts, the loss, and the inputs."""

    prediction: Prediction = option(
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
    variance: ModelVariance = option(
        "fixed",
        "variance of a reverse step; learned: by the network; learned_range: between its bounds",
        defines_run=True,
    )
    loss: Loss = option(
        "simple",
        "simple: squared error; vlb: variational bound; hybrid: simple + vlb_weight * vlb",
        defines_run=True,
    )
    vlb_weight: float = option(
        0.001, "hybrid: weight of the variational bound", above=0, defines_run=True
    )
    weighting: Literal["unit", "min_snr", "soft_min_snr", "p2", "edm", "uncertainty"] = option(
        "unit",
        "loss weight by t; edm: uses sigma_data; uncertainty: learned with the network",
        defines_run=True,
    )
    gamma: float = option(
        5.0,
        "min_snr, soft_min_snr: SNR at which the weight is clipped",
        above=0,
        defines_run=True,
    )
    p2_gamma: float = option(
        1.0, "p2: exponent; larger: lower weight at low noise", defines_run=True
    )
    p2_k: float = option(1.0, "p2: constant added to the SNR", above=0, defines_run=True)
    timesteps: Literal[
        "uniform", "low_discrepancy", "antithetic", "second_moment", "log_normal"
    ] = option(
        "uniform",
        "distribution of the training timesteps, which train/loss depends on; second_moment: "
        "in proportion to past losses",
        defines_run=True,
    )
    log_sigma_mean: float = option(-1.2, "log_normal: mean of log sigma", defines_run=True)
    log_sigma_deviation: float = option(
        1.2, "log_normal: standard deviation of log sigma", above=0, defines_run=True
    )
    offset_noise: float = option(
        0.0,
        "strength of additional noise that is constant per image and channel",
        at_least=0,
        defines_run=True,
    )
    input_perturbation: float = option(
        0.0,
        "strength of extra input noise that is not in the target",
        at_least=0,
        defines_run=True,
    )
    label_dropout: float = option(
        0.1,
        "model.num_classes > 0, text.encoder: fraction of images trained without label and text, "
        "for guidance",
        at_least=0,
        at_most=1,
        defines_run=True,
    )
    self_conditioning: bool = option(
        False, "condition the network on its previous estimate of x_0", defines_run=True
    )
    low_resolution_pixels: int = option(
        0,
        "condition on the image at this size in pixels, for super-resolution; 0: off",
        at_least=0,
        defines_run=True,
    )
    low_resolution_noise: float = option(
        0.0,
        "low_resolution_pixels > 0: standard deviation of noise added to the low-resolution image",
        at_least=0,
        defines_run=True,
    )
    low_resolution_blur: float = option(
        0.0,
        "low_resolution_pixels > 0: largest standard deviation of a Gaussian blur of that image, "
        "in its pixels; each image has one between 0 and this",
        at_least=0,
        at_most=8,
        defines_run=True,
    )
    low_resolution_crop: int = option(
        0,
        "low_resolution_pixels > 0: train on random squares of this side, in pixels of the large "
        "image; 0: on whole images",
        at_least=0,
        defines_run=True,
    )

    inpainting_masks: bool = option(
        False,
        "train an inpainting model: the network also sees the known part of each image, under a "
        "random mask, and the mask",
        defines_run=True,
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
        if self.inpainting_masks and self.low_resolution_pixels:
            yield (
                f"objective.inpainting_masks is true and objective.low_resolution_pixels "
                f"{self.low_resolution_pixels}; a network sees known pixels or a low-resolution "
                f"image: leave one of the two out"
            )
        for key in ("low_resolution_blur", "low_resolution_crop"):
            if (value := getattr(self, key)) and not self.low_resolution_pixels:
                yield (
                    f"objective.{key} is {value}, but there is no low-resolution image: set "
                    f"objective.low_resolution_pixels, or leave it out"
                )
        if self.timesteps == "second_moment" and self.loss == "simple":
            yield (
                "objective.timesteps is 'second_moment', which balances the terms of the bound; "
                "it has no use with objective.loss=simple: use loss=vlb or hybrid"
            )
