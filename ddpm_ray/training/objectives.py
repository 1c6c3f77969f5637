"""The training objective on one worker's share of a batch: what is drawn, the loss, its gradient.

Everything random about an image is drawn from (seed, step, its position in the global batch), so
that any number of workers, and any restart, give it the same t, noise and flip.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray import faults
from ddpm_ray.data.transforms import to_model_range
from ddpm_ray.diffusion import seeding
from ddpm_ray.diffusion.losses import simple_loss
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.seeding import Purpose
from ddpm_ray.training.reduction import SlotSum
from ddpm_ray.training.workers import Workers


@dataclass(frozen=True)
class Objective:
    """L_simple (Ho et al. 2020, eq. 14) on images, as configured."""

    schedule: NoiseSchedule
    seed: int
    flip: bool = False
    reseed_dropout: bool = False
    bf16: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    slots: int = 0  # of a global batch, summed as reduction.py says; 0: a mean over workers

    def backward(
        self, network: nn.Module, images: Tensor, step: int, workers: Workers, micro_batch: int
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the global batch's mean loss to `network`'s parameters.

        images [b, H, W, C] uint8 are this worker's share of global batch `step` (from 0), at
        positions rank * b ...; `micro_batch` of them pass at once. Returns losses [b] float32 and
        log-SNR [b] float64 of their steps t. A loss that is not finite makes the gradient NaN, so
        that after the workers' sum all of them see it in this same step.
        """
        if not self.slots:
            return self._slot(network, images, step, workers, workers.rank, micro_batch)
        mine, total, parts = workers.share(self.slots), SlotSum(network, self.slots), []
        for slot, part in zip(mine, images.chunk(len(mine)), strict=True):
            parts.append(self._slot(network, part, step, workers, slot, micro_batch))
            total.take()
        faults.at("gradient")
        total.share_out(workers)
        losses, log_snr = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(log_snr)

    def _slot(
        self, network: nn.Module, images: Tensor, step: int, workers: Workers, slot: int, most: int
    ) -> tuple[Tensor, Tensor]:
        """As `backward`, of the mean loss of these images, number `slot` of as many equal parts."""
        count = len(images)
        positions = torch.arange(count, device=workers.device) + slot * count
        if self.reseed_dropout:
            torch.manual_seed(
                seeding.derived_seed(self.seed, Purpose.DROPOUT, step, slot)
            )  # per step: a restart repeats it
        losses, log_snr = [], []
        for start in range(0, count, most):
            part = slice(start, start + most)
            last = start + most >= count
            with _sync_only(network, last), self._autocast(workers.device):
                loss, t = self.losses(network, images[part], step, positions[part], workers.device)
            share = loss.sum() / count * torch.where(loss.detach().isfinite().all(), 1.0, math.nan)
            if last and not self.slots:
                faults.at("gradient")
            with _sync_only(network, last):
                share.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            log_snr.append(self.schedule.log_snr(t))
        return torch.cat(losses), torch.cat(log_snr)

    def losses(
        self, network: nn.Module, images: Tensor, step: int, positions: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Losses [b] of images [b, H, W, C] uint8 at global positions [b], and their t [b]."""
        flips = seeding.coin(self.seed, Purpose.FLIP, step, positions) if self.flip else None
        x_0 = to_model_range(images.to(device, non_blocking=True), flips)
        x_0 = x_0.contiguous(memory_format=self.memory_format)
        num_steps = self.schedule.num_steps
        t = 1 + seeding.uniform_int(self.seed, Purpose.TIMESTEP, step, positions, num_steps)
        noise = seeding.normal(self.seed, Purpose.NOISE, step, positions, tuple(x_0.shape[1:]))
        noise = noise.contiguous(memory_format=self.memory_format)
        return simple_loss(network, self.schedule, x_0, t, noise), t

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def _sync_only(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients are summed over workers once per step, with its last micro-batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()
