"""Group normalisation (Wu and He 2018, arXiv:1803.08494) with statistics in float32.

In float32 the modules are torch's. In bfloat16 they read and write bfloat16, compute in float32
with float32 weights, and save only their input for the backward pass, which normalises it again.
B: batch; C: channels; H, W: height and width; G: groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIXED_DTYPES = ("cpu",)  # devices whose group norm takes bfloat16 with float32 weights
# Below so many pixels torch's norm of bfloat16 in NHWC on a CPU is slower than one in NCHW with
# two copies: 0.80 ms against 0.24 for [16, 64, 16, 16]; above it is faster, 0.13 against 0.63 for
# [16, 32, 32, 32]. The backward pass is always slower in NHWC, 0.9 against 0.3 and 2.8 against 0.9.
FAST_NHWC_PIXELS = 1024


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, [B, C, H, W] -> [B, C, H, W] in the dtype of the input.

    Its weights are float32 for a bfloat16 input as well. Under autocast it is torch's.
    """

    activates = False  # whether SiLU follows

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x, scaled and shifted per channel."""
        if x.dtype != torch.bfloat16 or in_autocast(x):
            return self._activated(super().forward(x))
        if torch.compiler.is_compiling():  # fused with its neighbours by the compiler
            return self._activated(super().forward(x.float())).to(x.dtype)
        x = x.contiguous(memory_format=_layout(x))
        weights = self.weight.float(), self.bias.float()
        result: Tensor = _BFloat16GroupNorm.apply(  # type: ignore[no-untyped-call]
            x, *weights, self.num_groups, self.eps, self.activates
        )
        return result

    def _activated(self, y: Tensor) -> Tensor:
        return F.silu(y) if self.activates else y


class GroupNormSiLU(GroupNorm):
    """`GroupNorm` followed by SiLU."""

    activates = True


def in_autocast(x: Tensor) -> bool:
    """Whether operations on x are under autocast; False on devices that have none, as meta."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class _BFloat16GroupNorm(torch.autograd.Function):
    """`GroupNorm` of a bfloat16 input [B, C, H, W] with float32 weights [C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activates: bool
    ) -> Tensor:
        """The norm of x in bfloat16, with SiLU if it `activates`; keeps x, not the result."""
        y, mean, rstd = _normalised(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps, ctx.activates = groups, eps, activates
        return F.silu(y, inplace=True) if activates else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (bfloat16), weight and bias (float32), where asked, and 3 times None."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        mixed = x.device.type in MIXED_DTYPES
        layout = _layout(x)
        if mixed:
            x, gradient = x.contiguous(), gradient.contiguous()
        if ctx.activates:
            if mixed:
                y, *_ = _normalised(x, weight, bias, ctx.groups, ctx.eps)
            else:
                y = _affine(x, weight, bias, mean, rstd)
            gradient = torch.ops.aten.silu_backward(gradient, y)
        if not mixed:  # CUDA's kernel takes a single dtype and layout
            x, gradient = x.float().contiguous(), gradient.float().contiguous()
        sizes = x.shape[0], x.shape[1], x.shape[2:].numel(), ctx.groups
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, weight, *sizes, ctx.needs_input_grad[:3]
        )
        to_x = None if to_x is None else to_x.to(torch.bfloat16, memory_format=layout)
        return to_x, to_weight, to_bias, None, None, None


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of x in bfloat16, and the float32 mean and 1 / deviation [B, G] of each group."""
    if x.device.type in MIXED_DTYPES:
        layout, pixels = _layout(x), x.shape[2:].numel()
        if pixels < FAST_NHWC_PIXELS:
            x = x.contiguous()
        sizes = x.shape[0], x.shape[1], pixels
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, groups, eps)
        return y.contiguous(memory_format=layout), mean, rstd
    mean, rstd = _statistics(x, groups, eps)
    return _affine(x, weight, bias, mean, rstd), mean, rstd


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Float32 mean and 1 / sqrt(variance + eps), each [B, G], without a float32 copy of x.

    The variance is E[x^2] - mean^2. What float32 loses in it is below what bfloat16 lost in x.
    """
    grouped, over = x.view(len(x), groups, -1, *x.shape[2:]), (2, 3, 4)
    count = grouped.shape[2:].numel()
    mean = grouped.sum(over, dtype=torch.float32) / count
    length = torch.linalg.vector_norm(grouped, 2, over, dtype=torch.float32)
    variance = (length.square() / count - mean.square()).clamp(min=0)
    return mean, (variance + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) * rstd * weight + bias in one kernel: computed in float32, stored in bfloat16."""
    scale = weight.view(mean.shape[1], -1) * rstd[:, :, None]  # [B, G, C / G]
    shift = (bias.view_as(scale[0]) - mean[:, :, None] * scale).flatten(1)[:, :, None, None]
    scale = scale.flatten(1)[:, :, None, None]
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of x, which is dense."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
