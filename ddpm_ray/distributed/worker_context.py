"""Rank, number of workers and device of a worker, from Ray Train."""

import ray.train
import ray.train.torch
import torch

from ddpm_ray.collectives import Workers


def distributed_context() -> Workers:
    """Rank, number of workers and device of this process in its Ray Train worker group."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # all_gather_object with NCCL uses the current device
    return Workers(context.get_world_rank(), context.get_world_size(), device)
