"""Casts in a forward pass, and the bytes that it saves for the backward pass, both counted."""

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ray.assembly import networks
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.training.bf16_weights import Bf16Weights

CIFAR = ImageShape(32, 32, 3)


class ForwardCost(NamedTuple):
    """Counts of the network of Ho et al. for CIFAR-10, at a quarter of its width."""

    casts: int  # between floating dtypes
    bytes_per_image: int  # saved for the backward pass, without what does not grow with the batch


class _Casts(TorchDispatchMode):
    """Counts conversions of a floating tensor to another floating dtype."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = (kwargs or {}).get("dtype")
        if func is torch.ops.aten._to_copy.default and wanted is not None:
            source = args[0].dtype
            self.count += source.is_floating_point and wanted not in (source, None)
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Saves what CUDA's fused attention saves, which fake CUDA tensors lack; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def forward_cost(precision: str, device: torch.device) -> ForwardCost:
    """Count a training forward pass with training.precision=`precision`."""
    config = load_config(RunConfig, None, ["name=x", "data.url=x", "model.base_channels=32"])
    network: Any = networks.network(config, CIFAR).to(device).train()
    if precision == "bf16_weights":
        network = Bf16Weights(network).network
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    saved, casts = [], 0
    for batch in (1, 2):
        x_t, t = torch.zeros(batch, 3, 32, 32, device=device), torch.ones(batch, device=device)
        kept: dict[int, Tensor] = {}  # holds them, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            host: Tensor = getattr(tensor, "host", tensor)  # of a fake CUDA tensor
            kept.setdefault(host.untyped_storage().data_ptr(), host)  # noqa: B023  # called here
            return tensor

        counter = _Casts()
        attention = mock.patch.object(F, "scaled_dot_product_attention", _FusedAttention.apply)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one)
        with attention, counter, autocast, hooks:
            loss = network(x_t, t.long())
        casts = counter.count
        saved.append(sum(one.untyped_storage().nbytes() for one in kept.values()))
        del loss
    return ForwardCost(casts, saved[1] - saved[0])
