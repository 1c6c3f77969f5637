"""Attention in bfloat16 training on a CPU: close to float32, and float32's own bits elsewhere."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.models.layers import attend


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A query [2, 3, 1, 8], and keys and values [2, 3, 5, 8]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, count, 8) for count in (1, 5, 5)]
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    query, key, value = (one.to(dtype).requires_grad_() for one in values)
    return query, key, value


def test_training_with_bfloat16_weights_has_the_gradients_of_float64() -> None:
    exact, rounded = inputs(torch.float64), inputs(torch.bfloat16)
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*exact).square().sum(), exact)
    found = torch.autograd.grad(attend(*rounded).float().square().sum(), rounded)
    for ours, one in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - one).norm() < 0.02 * one.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_and_autocast_keep_the_bits_of_torch(autocast: bool) -> None:
    parts = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = attend(*parts), F.scaled_dot_product_attention(*parts)
    assert torch.equal(found, wanted)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
