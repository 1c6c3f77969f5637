"""The training objective on one worker's share of a batch: its examples' losses and gradient."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray import counter_rng, fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.diffusion import loss_weighting, losses
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise
from ddpm_ray.training.deterministic_allreduce import SlotSum
from ddpm_ray.training.noising import Examples, Showing


class Losses(NamedTuple):
    """What a worker's share of a batch cost, image by image."""

    loss: Tensor  # [b] float32: as the papers report it, without weights
    t: Tensor  # [b] int64


@dataclass(frozen=True)
class Objective:
    """A loss on images, as configured."""

    showing: Showing
    parameterization: Parameterization
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    variance: Literal["fixed", "learned", "learned_range"] = "fixed"
    vlb_weight: float = 0.001
    weight: Tensor | None = None  # [T+1] of the squared error; None: 1
    uncertainty: Callable[[Tensor], Tensor] | None = None  # t -> log of the loss expected there
    classifies: bool = False  # the network answers with logits: it is told to know the label
    self_conditioning: bool = False
    reseed_dropout: bool = False
    bf16: bool = False
    slots: int = 0  # of a global batch, summed as reduction.py says; 0: a mean over workers

    @property
    def schedule(self) -> NoiseSchedule:
        """That of what is predicted."""
        return self.parameterization.schedule

    def backward(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: int,
        workers: Workers,
        micro_batch: int,
    ) -> Losses:
        """Adds the gradient of the global batch's mean loss to `network`'s parameters.

        images [b, H, W, C] uint8 and labels [b] are this worker's share of global batch `step`
        (from 0), at positions rank * b ...; `micro_batch` of them pass at once. A loss that is not
        finite makes the gradient NaN, so that after the workers' sum all of them see it in this
        same step.
        """
        if not self.slots:
            return self._slot(network, images, labels, step, workers, workers.rank, micro_batch)
        mine, total, parts = workers.share(self.slots), SlotSum(network, self.slots), []
        pieces = zip(mine, images.chunk(len(mine)), labels.chunk(len(mine)), strict=True)
        for slot, some, their in pieces:
            parts.append(self._slot(network, some, their, step, workers, slot, micro_batch))
            total.take()
        fault_injection.at("gradient")
        total.share_out(workers)
        return Losses(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _slot(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        step: int,
        workers: Workers,
        slot: int,
        most: int,
    ) -> Losses:
        """As `backward`, of the mean loss of these images, number `slot` of as many equal parts."""
        count = len(images)
        positions = torch.arange(count, device=workers.device) + slot * count
        if self.reseed_dropout:
            torch.manual_seed(
                counter_rng.derived_seed(self.showing.seed, Purpose.DROPOUT, step, slot)
            )  # per step: a restart repeats it
        parts = []
        for start in range(0, count, most):
            part = slice(start, start + most)
            last = start + most >= count
            examples = self.showing.examples(
                images[part], labels[part], step, positions[part], workers.device
            )
            with _sync_only(network, last), self._autocast(workers.device):
                loss = self.losses(network, examples, step)
                weighted = self.weighted(loss, examples)
            finite = loss.detach().isfinite().all()
            share = weighted.sum() / count * torch.where(finite, 1.0, math.nan)
            if last and not self.slots:
                fault_injection.at("gradient")
            with _sync_only(network, last):
                share.backward()  # type: ignore[no-untyped-call]
            parts.append(Losses(loss.detach(), examples.t))
        return Losses(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def losses(self, network: nn.Module, examples: Examples, step: int) -> Tensor:
        """Losses [b] float32 of examples of batch `step`, without weights."""
        x_0, t, noise = examples.x_0, examples.t, examples.noise
        if self.classifies:  # (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4)
            assert examples.labels is not None  # a classifier's config has classes
            logits = network(add_noise(self.schedule, x_0, t, noise), t)
            # An image without a label, which is one more than there are, teaches nothing: loss 0.
            null = logits.shape[1]
            return F.cross_entropy(
                logits.float(), examples.labels, reduction="none", ignore_index=null
            )
        denoise = self._denoise(network, examples, step)
        if self.loss == "simple" or self.variance == "fixed":
            return losses.simple_loss(
                denoise, self.schedule, x_0, t, noise, parameterization=self.parameterization
            )
        if self.loss == "vlb":
            return losses.vlb_loss(
                denoise, self.parameterization, x_0, t, noise, variance=self.variance
            )
        return losses.hybrid_loss(
            denoise, self.parameterization, x_0, t, noise,
            variance=self.variance, vlb_weight=self.vlb_weight,
        )  # fmt: skip

    def weighted(self, loss: Tensor, examples: Examples) -> Tensor:
        """What is averaged and minimised: losses [b] with the weights of t and of its choice."""
        if self.uncertainty is not None:
            loss = loss_weighting.uncertain(loss, self.uncertainty(examples.t))
        if self.weight is not None:
            loss = loss * self.weight[examples.t].to(loss)
        return loss if examples.importance is None else loss * examples.importance.to(loss)

    def _denoise(self, network: nn.Module, examples: Examples, step: int) -> Denoise:
        """The network with all that it is shown beside x_t and t."""
        beside = [] if examples.low_resolution is None else [examples.low_resolution]
        if self.self_conditioning:
            beside.insert(0, self._estimate(network, examples, beside, step))
        condition = torch.cat(beside, 1) if beside else None
        schedule, more = self.schedule, examples.perturbation

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            """The network's answer to x_t, perturbed and scaled as it is shown it."""
            if more is not None:
                x_t = x_t + (1 - schedule.at(t, x_t)).sqrt().to(x_t) * more
            answer: Tensor = network(
                self.parameterization.scaled(x_t, t), t, examples.labels, condition
            )
            return answer

        return denoise

    def _estimate(
        self, network: nn.Module, examples: Examples, beside: list[Tensor], step: int
    ) -> Tensor:
        """In half of the steps the network's own estimate of x_0, without gradient; else 0.

        (Chen et al. 2022, arXiv:2208.04202, section 3.2 and algorithm 1.) All images of a step
        alike, so that the other half costs nothing.
        """
        nothing = torch.zeros_like(examples.x_0)
        if counter_rng.derived_seed(self.showing.seed, Purpose.SELF_CONDITIONING, step, 0) % 2:
            return nothing
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        x_t = add_noise(self.schedule, examples.x_0, examples.t, examples.noise)
        with torch.no_grad():
            answer = inner(
                self.parameterization.scaled(x_t, examples.t), examples.t, examples.labels,
                torch.cat([nothing, *beside], 1),
            )  # fmt: skip
            mean = answer if self.variance == "fixed" else answer.chunk(2, 1)[0]
            return self.parameterization.x_0(x_t, examples.t, mean).clamp_(-1, 1)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def _sync_only(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients are summed over workers once per step, with its last micro-batch."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()
