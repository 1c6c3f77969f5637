"""Draw images from a denoiser; image i depends on (seed, i) only.

The noise of image i is the same whether it is drawn alone, in a batch of 64 or on another worker.
Images may still differ in the last bits between batch sizes, because matrix products then sum in
another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ray.choices import ReverseVariance
from ddpm_ray.config.sampling import Sampler, SamplingSettings
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import samplers, solvers, timestep_spacing
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.samplers import Noise, OnStep
from ddpm_ray.diffusion.x0_estimator import Clip
from ddpm_ray.sampling.denoiser import Denoiser, Guidance

Images: TypeAlias = npt.NDArray[np.uint8]  # [N, H, W, C]


@dataclass(frozen=True)
class SamplingPlan:
    """Sampling settings and the steps they visit: with a denoiser and an index, an image."""

    steps: tuple[int, ...]  # strictly decreasing from T to 0
    settings: SamplingSettings = field(default_factory=SamplingSettings)  # labels are numbers

    @property
    def labels(self) -> tuple[int, ...]:
        """Image i has labels[i % len(labels)]; empty: i % num_classes."""
        return cast(tuple[int, ...], self.settings.labels)

    @property
    def guidance(self) -> Guidance:
        """The settings of classifier-free guidance."""
        of = self.settings
        return Guidance(
            of.guidance_scale,
            of.guidance_rescale,
            of.guidance_above_sigma,
            of.guidance_below_sigma,
            of.negative_prompt,
        )

    def clipping(self, codec: Codec) -> Clip | None:
        """The function that clips estimates of x_0; None: no clipping."""
        if self.settings.clip is False:
            return None
        return codec.clip(self.settings.dynamic_quantile)


def first_step(schedule: NoiseSchedule, sampler: Sampler) -> int:
    """The first step: T, or the noisiest usable step for samplers that divide by alpha_bar."""
    if sampler in ("heun", "plms"):
        return timestep_spacing.noisiest_step(schedule)
    return schedule.num_steps


def sampling_plan(
    settings: SamplingSettings, schedule: NoiseSchedule, label_names: Sequence[str] | None = None
) -> SamplingPlan:
    """The plan of `settings` for a model with this schedule; label names become numbers.

    Raises ValueError for a label that is not in `label_names`, and for a prompt that cannot be a
    caption.
    """
    first = first_step(schedule, settings.sampler)
    count = min(settings.steps, first)
    match settings.spacing:
        case "uniform":
            steps = timestep_spacing.uniform_steps(first, count)
        case "quadratic":
            steps = timestep_spacing.quadratic_steps(first, count)
        case "log_snr":
            steps = timestep_spacing.log_snr_steps(schedule, count, first)
        case _:
            assert_never(settings.spacing)
    labels, prompts = settings.numbered(label_names), settings.clean_prompts
    return SamplingPlan(steps, replace(settings, labels=labels, prompts=prompts))


def draw(
    denoiser: Denoiser,
    plan: SamplingPlan,
    index: Tensor,
    image_shape: ImageShape,
    device: torch.device | str,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the images `index` [N] int64: float32 [N, C, H, W], pixels about in [-1, 1].

    `on_step(t, x_t, x_0_estimate)` is called at each step and must copy
    tensors that it keeps. Raises ValueError for steps that the sampler does not support.
    """
    shape = denoiser.codec.shape(image_shape)

    def noise(t: int) -> Tensor:
        return normal(plan.settings.seed, Purpose.SAMPLE_STEP, t, index, shape)

    index = index.to(device)
    x_T = normal(plan.settings.seed, Purpose.SAMPLE_START, 0, index, shape)
    conditioning = denoiser.conditioning(index, plan.labels, plan.settings.prompts)
    denoise = denoiser.bind_conditioning(conditioning, plan.guidance)
    return run_sampler(denoiser, denoise, plan, x_T, noise, on_step)


def run_sampler(
    denoiser: Denoiser,
    denoise: Denoise,
    plan: SamplingPlan,
    x_T: Tensor,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the plan's sampler from x_T; `denoise` is `denoiser` with its inputs bound."""
    settings = plan.settings
    variance = _reverse_variance(denoiser, settings)
    if settings.variance != "learned":
        denoise = denoiser.without_variance(denoise)
    estimate = denoiser.estimator(denoise, plan.clipping(denoiser.codec))
    match settings.sampler:
        case "ancestral":
            return samplers.ancestral(
                estimate, x_T, plan.steps, noise=noise, variance=variance, on_step=on_step
            )
        case "ddim":
            return samplers.ddim(
                estimate,
                x_T,
                plan.steps,
                eta=settings.eta,
                noise=noise,
                variance=variance,
                on_step=on_step,
            )
        case "dpm_solver_pp":
            return solvers.dpm_solver_pp(estimate, x_T, plan.steps, on_step=on_step)
        case "dpm_solver_pp_sde":
            return solvers.dpm_solver_pp(estimate, x_T, plan.steps, noise=noise, on_step=on_step)
        case "unipc":
            return solvers.unipc(estimate, x_T, plan.steps, on_step=on_step)
        case "heun":
            return solvers.heun(estimate, x_T, plan.steps, on_step=on_step)
        case "plms":
            return solvers.plms(estimate, x_T, plan.steps, on_step=on_step)
        case _:
            assert_never(settings.sampler)


def _reverse_variance(denoiser: Denoiser, settings: SamplingSettings) -> ReverseVariance:
    """The variance of the added noise. Raises ValueError for one that is not available."""
    if settings.variance != "learned":
        return settings.variance
    if settings.sampler != "ancestral":
        raise ValueError(f"variance is 'learned'; {settings.sampler} has none: use fixed_small")
    if denoiser.variance == "fixed":
        raise ValueError("variance is 'learned', but the network predicts none; use fixed_small")
    return denoiser.variance


def draw_uint8(
    denoiser: Denoiser,
    plan: SamplingPlan,
    indices: range,
    image_shape: ImageShape,
    device: torch.device | str,
    batch_size: int,
    on_step: OnStep | None = None,
) -> Images:
    """Images uint8 [N, H, W, C] of the N `indices`, `batch_size` in one network call."""
    if not indices:  # of more workers than images, some draw none
        return np.empty((0, *image_shape), np.uint8)
    batches = torch.split(torch.tensor(indices), batch_size)
    drawn = (draw(denoiser, plan, i, image_shape, device, on_step=on_step) for i in batches)
    return np.concatenate([denoiser.codec.decode(x_0) for x_0 in drawn])
