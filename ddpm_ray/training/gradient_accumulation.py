"""Slots and micro-batches: from the losses of a few images to the gradient of a global batch."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray import counter_rng, fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.loader import Batch
from ddpm_ray.training import step_clock
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.deterministic_allreduce import DeterministicAllReduce, mean_over_workers


class Losses(NamedTuple):
    """Losses per image of one worker's share of a batch."""

    loss: Tensor  # [b] float32, unweighted, as papers report it
    t: Tensor  # [b] int64; 0 where a task has no noise
    terms: Tensor  # [b, n] float32: further values that the objective reports; n may be 0


PartLosses: TypeAlias = Callable[[Batch, Tensor], tuple[Losses, Tensor]]
"""(samples, positions [b]) of a micro-batch -> its losses, detached, and the values [b] that
are minimised."""


@dataclass(frozen=True)
class GradientAccumulation:
    """Computes the gradient of a global batch's mean loss from the losses of its micro-batches."""

    network: nn.Module
    part_losses: PartLosses
    step: int  # number of the global batch, from 0
    workers: Workers
    others: Sequence[Tensor] = ()  # further leaves to average over workers, not by DDP
    slots: int = 0  # slots of a global batch, see deterministic_allreduce.py; 0: mean over workers
    dropout_seed: int | None = None  # None: no dropout
    weights: Sequence[Bf16Weights] = ()  # that networks compute with; the first are `network`'s
    cuda_graphs: bool = False  # each call of `network` overwrites the gradients of the one before

    def backward(self, batch: Batch, micro_batch: int) -> Losses:
        """Add the gradient of the global batch's mean loss to all leaves.

        `batch`, of b samples as the data set stores them, is this worker's share of the global
        batch, whose positions begin at rank * b; each call of `part_losses` takes `micro_batch` of
        its samples. A loss that is not finite makes the gradient NaN, so that all workers
        see it after the all-reduce of the same step.
        """
        workers = self.workers
        for weights in self.weights:
            weights.refresh()
        if not self.slots:
            found = self._slot(batch, workers.rank, micro_batch)
            if self.others:
                step_clock.mark("communication")
                mean_over_workers(self.others, workers)
            return found
        mine, parts = workers.share(self.slots), []
        total = DeterministicAllReduce(self._leaves(), self.slots)
        size = len(batch.images) // len(mine)
        for number, slot in enumerate(mine):
            some = batch.rows(slice(number * size, (number + 1) * size))
            parts.append(self._slot(some, slot, micro_batch))
            total.accumulate()
        fault_injection.at("gradient")
        step_clock.mark("communication")
        total.all_reduce(workers)
        return _joined(parts)

    def _slot(self, batch: Batch, slot: int, most: int) -> Losses:
        """Add the gradient of the mean loss of these samples, which are slot number `slot`."""
        count = len(batch.images)
        positions = torch.arange(count, device=self.workers.device) + slot * count
        if self.dropout_seed is not None:
            torch.manual_seed(
                counter_rng.derived_seed(self.dropout_seed, Purpose.DROPOUT, self.step, slot)
            )  # per step: a restart repeats it
        parts = []
        for start in range(0, count, most):
            part = slice(start, start + most)
            step_clock.mark("forward")
            last = start + most >= count
            with _sync_only(self.network, last):
                losses, minimised = self.part_losses(batch.rows(part), positions[part])
            finite = losses.loss.isfinite().all()
            share = minimised.sum() / count * torch.where(finite, 1.0, math.nan)
            if last and not self.slots:
                fault_injection.at("gradient")
            step_clock.mark("backward")
            with _sync_only(self.network, last):
                share.backward()  # type: ignore[no-untyped-call]
            for weights in self.weights:
                weights.collect_gradients()
            if self.cuda_graphs and not last:
                for leaf in self._leaves():
                    leaf.grad = None if leaf.grad is None else leaf.grad.clone()
            parts.append(losses)
        return _joined(parts)

    def _leaves(self) -> list[Tensor]:
        """The tensors that get the gradient: float32 weights of the network, and `others`."""
        trained = self.weights[0].model if self.weights else self.network
        return [*(one for one in trained.parameters() if one.requires_grad), *self.others]


def _joined(parts: Sequence[Losses]) -> Losses:
    return Losses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _sync_only(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Context that postpones DDP's all-reduce to the last micro-batch of a step."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()
