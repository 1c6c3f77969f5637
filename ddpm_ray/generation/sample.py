"""Images from a denoiser: which image is a function of (seed, its index), and of nothing else.

Whether an index is drawn alone, in a batch of 64 or on another worker, its start noise and its
fresh noise are the same. What a network makes of them may differ in the last bits between batch
sizes, because its matrix products then sum in another order.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ddpm_ray.diffusion import samplers, spacing
from ddpm_ray.diffusion.estimate import clip_to_range
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.samplers import OnStep, Variance
from ddpm_ray.diffusion.seeding import Purpose, normal

Images: TypeAlias = npt.NDArray[np.uint8]  # [N, H, W, C]
Sampler: TypeAlias = Literal["ddim", "ancestral"]


@dataclass(frozen=True)
class SamplingPlan:
    """All that fixes an image beside the denoiser and the image's index."""

    steps: tuple[int, ...]  # falls from T to 0: one network call less than entries
    sampler: Sampler = "ddim"
    eta: float = 0.0  # ddim only: 0 adds no fresh noise, 1 as much as ancestral
    variance: Variance = "fixed_small"
    clip: bool = True
    seed: int = 0


def draw(
    denoise: Denoise,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    index: Tensor,
    image_shape: tuple[int, int, int],
    device: torch.device | str,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images float32 [N, C, H, W], in about [-1, 1], of the indices `index` [N] int64.

    `image_shape` is (C, H, W). `on_step(t, x_t, x_0_estimate)` sees each step; it copies what it
    wants to keep. Raises ValueError for steps that the sampler cannot take.
    """

    def noise(t: int) -> Tensor:
        return normal(plan.seed, Purpose.SAMPLE_STEP, t, index, image_shape)

    index = index.to(device)
    x_T = normal(plan.seed, Purpose.SAMPLE_START, 0, index, image_shape)
    match plan.sampler:
        case "ddim":
            return samplers.ddim(
                schedule, denoise, x_T, plan.steps, eta=plan.eta, noise=noise,
                variance=plan.variance, clip=clip_to_range if plan.clip else None, on_step=on_step,
            )  # fmt: skip
        case "ancestral":
            return samplers.ancestral(
                schedule, denoise, x_T, plan.steps, noise=noise,
                variance=plan.variance, clip=clip_to_range if plan.clip else None, on_step=on_step,
            )  # fmt: skip
        case _:
            assert_never(plan.sampler)


def draw_uint8(
    denoise: Denoise,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    indices: range,
    image_shape: tuple[int, int, int],
    device: torch.device | str,
    batch_size: int,
) -> Images:
    """Images uint8 [N, H, W, C] of the N `indices`, `batch_size` in one network call."""
    batches = torch.split(torch.tensor(indices), batch_size)
    drawn = (draw(denoise, schedule, plan, index, image_shape, device) for index in batches)
    return np.concatenate([to_uint8(images) for images in drawn])


def to_uint8(images: Tensor) -> Images:
    """uint8 [N, H, W, C] of images [N, C, H, W] in [-1, 1]: (x + 1) * 127.5, half up, clamped.

    Raises ValueError where a value is not finite: as uint8 it would be a pixel like any other.
    """
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise ValueError(
            f"{bad} of {len(images)} images hold values that are not finite; the network's weights "
            "or its precision are broken: sample from an earlier checkpoint or in float32"
        )
    scaled = images.float().add(1).mul_(127.5).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained network and all that sampling from it needs; what `ddpm_ray.load` returns."""

    network: nn.Module  # in eval mode, on `device`
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]  # (C, H, W)
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    variance: Variance = "fixed_small"  # of the ancestral sampler's fresh noise
    device: torch.device | str = "cpu"

    def sample(
        self,
        num_images: int,
        *,
        steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        labels: object = None,
        guidance_scale: float = 1.0,
        batch_size: int = 64,
    ) -> Images:
        """uint8 images [num_images, H, W, C]: of one seed, image i is the same in any call.

        `steps` network calls per image, evenly spaced over 1..T. Up to rounding (one grey level in
        few pixels) `batch_size` changes only speed and memory. Raises ValueError.
        """
        if labels is not None or guidance_scale != 1.0:
            raise ValueError(
                f"labels is {labels!r} and guidance_scale {guidance_scale:g}, but this model was "
                "trained without labels; leave both out"
            )
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if sampler not in ("ddim", "ancestral"):
            raise ValueError(f"sampler is {sampler!r}; choose 'ddim' or 'ancestral'")
        num_steps = self.schedule.num_steps
        if not 1 <= steps <= num_steps:
            raise ValueError(
                f"steps is {steps}; this model was trained with T = {num_steps} diffusion steps, "
                f"so choose from 1..{num_steps}"
            )
        plan = SamplingPlan(
            steps=spacing.uniform_steps(num_steps, steps),
            sampler=sampler,
            eta=eta,
            variance=self.variance if sampler == "ancestral" else "fixed_small",
            seed=seed,
        )
        return self.draw(plan, num_images, batch_size)

    def draw(self, plan: SamplingPlan, num_images: int, batch_size: int) -> Images:
        """The images 0..num_images-1 of `plan`, uint8 [num_images, H, W, C]."""
        indices, shape = range(num_images), self.image_shape
        return draw_uint8(
            self.network, self.schedule, plan, indices, shape, self.device, batch_size
        )
