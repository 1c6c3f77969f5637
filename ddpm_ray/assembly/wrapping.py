"""The network as a worker trains it: compiled and wrapped by DDP, as configured."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray.assembly.compilation import compiled
from ddpm_ray.collectives import Workers
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.training.gradient_allreduce import GradientAllReduce, reduce_bucket
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.step_clock import StepClock, watch_all_reduce


def wrapped(
    state: TrainingState,
    config: TrainingConfig,
    workers: Workers,
    clock: StepClock | None = None,
) -> nn.Module:
    """The network of `state` that computes the losses, compiled and averaging its gradients.

    `clock`, if given, measures how long this worker waits for the others. Raises
    NoCompilerError as `compiled`.
    """
    network = compiled(
        state.network, config.compile, workers.device, "training", config.compile_fallback
    )
    if workers.count == 1 or config.reduction != "mean":
        return network
    parallel = DistributedDataParallel(
        network,
        device_ids=[workers.device] if workers.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # the only ones, a DiT's positions, are the same everywhere
        bucket_cap_mb=config.ddp_bucket_mb or None,
        static_graph=config.ddp_static_graph,
    )
    compresses = config.gradient_compression == "bf16"
    if compresses or state.weights is not None:
        dtype = torch.bfloat16 if compresses else torch.float32
        parallel.register_comm_hook(GradientAllReduce(state.weights, dtype), reduce_bucket)
    if clock is not None:
        watch_all_reduce(clock, parallel)
    return parallel
