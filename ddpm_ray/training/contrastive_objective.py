"""The training objective of an image and a text encoder: a loss over the whole global batch.

The loss of an image depends on all captions of the batch, and so on all workers and micro-batches.
The gradient of the loss with respect to the embeddings is all that the encoders need of it (Gao et
al. 2021, arXiv:2101.06983, "GradCache"): embeddings are gathered over the workers, each worker
computes loss and gradients of the N embeddings, and the embeddings of its micro-batches are
multiplied with these gradients. So micro-batches and the sum over workers are those of every other
task.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray import counter_rng, fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.loader import Batch
from ddpm_ray.models.contrastive import Embedded
from ddpm_ray.training import step_clock
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.contrastive_loss import (
    ContrastiveLoss,
    batch_recall,
    contrastive_losses,
    equal_rows,
)
from ddpm_ray.training.gradient_accumulation import GradientAccumulation, Losses

TERMS = ("train/batch_recall", "train/logit_scale", "train/logit_bias")


class GlobalLoss(NamedTuple):
    """Losses of a global batch of N images, and the gradient of their sum."""

    losses: Tensor  # [N] float32
    recall: Tensor  # [N] float32: 1 where the nearest caption of the batch is right
    gradient: Embedded  # with respect to embeddings, scale and bias


@dataclass(frozen=True)
class ContrastiveObjective:
    """The loss of all pairs of an image and a caption of the global batch."""

    seed: int
    loss: ContrastiveLoss
    flip: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    bf16: bool = False  # autocast of the encoders
    weights: Bf16Weights | None = None  # that the encoders compute with
    slots: int = 0  # as in GradientAccumulation
    cuda_graphs: bool = False  # as in GradientAccumulation

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        step: int,
        workers: Workers,
        micro_batch: int,
    ) -> Losses:
        """Add the gradient of the global batch's mean loss to the parameters of `network`.

        Arguments are as in `TrainingObjective.backward`; the batch has tokens.
        """
        if self.weights is not None:
            self.weights.refresh()  # before the first pass below
        work = _Step(self, network, step, workers)
        if self.slots or micro_batch < len(batch.images):
            work.found = work.embed_first(batch, micro_batch)
        return GradientAccumulation(
            network,
            work.part_losses,
            step,
            workers,
            slots=self.slots,
            cuda_graphs=self.cuda_graphs,
            weights=[self.weights] if self.weights else (),
        ).backward(batch, micro_batch)

    def log_snr(self, t: Tensor) -> None:
        """Return None: the encoders see images without noise."""

    def embedded(
        self, network: nn.Module, batch: Batch, step: int, positions: Tensor, device: torch.device
    ) -> Embedded:
        """Embeddings of the samples at `positions` [b] of batch `step`."""
        assert batch.tokens is not None  # a config with this task has text
        flips = counter_rng.coin(self.seed, Purpose.FLIP, step, positions) if self.flip else None
        x = PIXELS.encode(batch.images.to(device, non_blocking=True), flips)
        x = x.contiguous(memory_format=self.memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            found: Embedded = network(x, batch.tokens.to(device, non_blocking=True))
        return found

    def global_loss(self, mine: Embedded, tokens: Tensor, workers: Workers) -> GlobalLoss:
        """Loss of the global batch from this worker's embeddings; all workers must call it."""
        fault_injection.at("embeddings")
        step_clock.mark("communication")
        both = workers.gather_rows(torch.cat([mine.images, mine.texts], 1).detach())
        tokens = workers.gather_rows(tokens.to(both.device))
        step_clock.mark("forward")
        needed = *both.chunk(2, dim=1), mine.log_scale, mine.bias
        leaves = Embedded(*(one.detach().clone().requires_grad_() for one in needed))
        positive = equal_rows(tokens)
        with torch.enable_grad():
            losses = contrastive_losses(leaves, positive, self.loss)
            gradient = torch.autograd.grad(losses.sum(), leaves)
        recall = batch_recall(leaves.images, leaves.texts, positive)
        return GlobalLoss(losses.detach(), recall.detach(), Embedded(*gradient))


@dataclass
class _Step:
    """One step of the objective on one worker."""

    objective: ContrastiveObjective
    network: nn.Module
    number: int
    workers: Workers
    found: GlobalLoss | None = None  # None: from the only micro-batch, when it is embedded

    @torch.no_grad()
    def embed_first(self, batch: Batch, micro_batch: int) -> GlobalLoss:
        """The global loss from a first pass over all micro-batches, without their graphs."""
        network, device = self.network, self.workers.device
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        count, parts = len(batch.images), list[Embedded]()
        first = self.workers.rank * count
        for part in self._micro_batches(count, micro_batch):
            step_clock.mark("forward")
            positions = torch.arange(part.start, part.stop, device=device) + first
            some = batch.rows(part)
            found = self.objective.embedded(inner, some, self.number, positions, device)
            parts.append(Embedded(*(one.clone() for one in found)))  # graphs reuse their memory
        images, texts = (torch.cat([part[i] for part in parts]) for i in range(2))
        mine = Embedded(images, texts, *parts[0][2:])
        assert batch.tokens is not None
        return self.objective.global_loss(mine, batch.tokens, self.workers)

    def part_losses(self, batch: Batch, positions: Tensor) -> tuple[Losses, Tensor]:
        """Losses of a micro-batch, and values [b] whose gradient is that of the global loss."""
        device = self.workers.device
        mine = self.objective.embedded(self.network, batch, self.number, positions, device)
        found = self.found
        if found is None:
            assert batch.tokens is not None
            found = self.objective.global_loss(mine, batch.tokens, self.workers)
        losses, gradient, count = found.losses[positions], found.gradient, len(found.losses)
        surrogate = (mine.images * gradient.images[positions]).sum(1)
        surrogate = surrogate + (mine.texts * gradient.texts[positions]).sum(1)
        # Each of the N values has an equal share of the gradients of scale and bias.
        shared = mine.log_scale * gradient.log_scale + mine.bias * gradient.bias
        minimised = surrogate + shared / count
        scalars = torch.stack([mine.log_scale.exp(), mine.bias]).detach().expand(len(losses), 2)
        terms = torch.cat([found.recall[positions, None], scalars], 1)
        t = torch.zeros(len(losses), dtype=torch.int64, device=device)
        return Losses(losses, t, terms), minimised

    def _micro_batches(self, count: int, most: int) -> Iterator[slice]:
        """Yield the micro-batches of `count` samples, as GradientAccumulation makes them."""
        slots = self.objective.slots
        size = count // len(self.workers.share(slots)) if slots else count
        for slot in range(0, count, size):
            for start in range(slot, slot + size, most):
                yield slice(start, min(start + most, slot + size))


class ContrastiveMonitor:
    """The `metrics_buffer.Terms` of a contrastive run."""

    count = len(TERMS)

    def metrics(self, means: Tensor, step: int) -> dict[str, float]:
        """Metrics of one step, from its mean terms."""
        return dict(zip(TERMS, means.tolist(), strict=True))

    def end_window(self, step: int, row: dict[str, float], *, is_main: bool) -> None:
        """Do nothing at the end of a window."""
