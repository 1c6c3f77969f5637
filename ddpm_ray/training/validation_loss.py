"""Validation loss by log-SNR, which is comparable across noise schedules.

The training loss is a mean over t, and the noise level of a t depends on the schedule and on T. At
a fixed log-SNR the denoising task is the same for all schedules. The loss is measured on fixed
images with fixed noise, with the EMA weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.loader import Batch
from ddpm_ray.evaluation.loss_by_snr import loss_at_log_snr, validation_loss
from ddpm_ray.reporting import Row, Sink
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.training.state import TrainingState

# The linear schedule of Ho et al. spans -10.1 to 9.2 at T = 1000. Beyond these levels a denoiser
# of small images does hardly better or worse than a guess.
LEVELS = tuple(level + 0.5 for level in range(-8, 8))
SEED = 0  # of images and noise: equal in all runs on a data set


@dataclass(frozen=True)
class Validator:
    """Computes the validation loss of the EMA weights; each worker takes a share of images."""

    state: TrainingState
    denoiser: Denoiser  # of the EMA weights
    samples: Batch  # as stored: this worker's, whole groups of one image per level
    first_index: int  # index of the first of them among all workers' images
    variance: float  # of x_0, for the levels outside the schedule's range
    workers: Workers
    sink: Sink | None  # on the main worker
    batch_size: int = 64

    def validate(self, step: int) -> None:
        """Add the losses of `step` to the state and to the metrics; all workers must call it."""
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        chunk = max(1, self.batch_size // (2 * len(LEVELS))) * len(LEVELS)  # two timesteps each
        total, groups = torch.zeros(len(LEVELS) + 1, dtype=torch.float64), len(LEVELS)
        for start in range(0, len(self.samples.images), chunk):
            part = self.samples.rows(slice(start, start + chunk))
            count = len(part.images) // groups
            total[:groups] += count * self._losses_by_level(part, start, levels).cpu()
            total[groups] += count
        self.workers.sum_(total)
        losses = total[:groups] / total[groups]
        loss = validation_loss(losses, levels)
        self.state.validation_losses.append(
            {"step": step, "loss": loss, "spectrum": losses.tolist()}
        )
        if self.sink is not None:
            by_level = {
                f"eval/loss_logsnr/{level:g}": float(value)
                for level, value in zip(LEVELS, losses, strict=True)
            }
            self.sink.rows([Row(step, {"eval/loss_common": loss} | by_level)])

    def _losses_by_level(self, part: Batch, start: int, levels: Tensor) -> Tensor:
        device = self.workers.device
        there = part.map(lambda tensor: tensor.to(device))
        images, labels = there.tensors
        index = torch.arange(len(images), device=device) + self.first_index + start
        x_0 = self.denoiser.codec.draw(images, None, SEED, 0, index)
        noise = counter_rng.normal(SEED, Purpose.VALIDATION, 0, index, tuple(x_0.shape[1:]))
        of_data = self.denoiser.takes.of_data(x_0, labels, *there.inputs)
        conditioning = of_data.repeat(2)  # two timesteps each
        return loss_at_log_snr(
            self.denoiser.noise(conditioning),
            self.denoiser.schedule,
            x_0,
            noise,
            levels.to(device),
            self.variance,
        )
