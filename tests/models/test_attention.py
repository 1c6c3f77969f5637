"""Attention in bfloat16 on a CPU: close to float64, and torch's own bits elsewhere."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.models import layers
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


@pytest.mark.parametrize("most_keys", [4, 5])
def test_without_a_gradient_many_keys_take_the_fused_kernel(
    most_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of 5 keys keep all their weights in memory; the fused kernel does not."""
    monkeypatch.setattr(layers, "MAX_KEYS_OF_PRODUCTS", most_keys)
    parts, exact = inputs(torch.bfloat16), inputs(torch.float64)
    fused = mock.Mock(wraps=F.scaled_dot_product_attention)
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", fused):
        found = attend(*parts)
    assert fused.called == (most_keys < 5)
    wanted = F.scaled_dot_product_attention(*exact)
    assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_and_autocast_keep_the_bits_of_torch(autocast: bool) -> None:
    parts = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = attend(*parts), F.scaled_dot_product_attention(*parts)
    assert torch.equal(found, wanted)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
