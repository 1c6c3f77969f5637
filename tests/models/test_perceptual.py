"""Perceptual distance: closed forms for known angles, and Inception's stages as its features."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.evaluation.features.inception import Inception
from ddpm_ray.models.perceptual import PerceptualDistance


def directions(x: Tensor) -> list[Tensor]:
    """One stage whose features at each pixel are a vector of angle x and length 5."""
    return [5 * torch.cat([x.cos(), x.sin()], dim=1)]


def images(seed: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, side, side, generator=generator) * 2 - 1


@given(st.floats(-math.pi, math.pi), st.floats(-math.pi, math.pi))
def test_the_distance_of_two_directions_is_two_minus_twice_the_cosine(a: float, b: float) -> None:
    x = torch.tensor([a, 0.0]).view(1, 1, 1, 2)
    x_hat = torch.tensor([b, 0.0]).view(1, 1, 1, 2)  # the second pixel does not differ
    found = PerceptualDistance(directions)(x, x_hat)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(1 - math.cos(a - b), abs=1e-5)


def test_stages_are_summed_and_the_scale_of_none_matters() -> None:
    def two_stages(x: Tensor) -> Sequence[Tensor]:
        return [*directions(x), 1000 * directions(F.avg_pool2d(x, 2))[0]]

    x, x_hat = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), math.pi / 2)
    assert PerceptualDistance(two_stages)(x, x_hat).item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_inceptions_stages_give_a_distance_with_gradients(channels: int) -> None:
    torch.manual_seed(0)
    distance = PerceptualDistance(Inception((192,)).first_stages)
    x, x_hat = (images(seed)[:, :channels] for seed in (1, 2))
    x_hat.requires_grad_()
    distance(x, x_hat).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()
    assert x_hat.grad.any()
    assert distance(x, x).abs().max() == 0
    torch.testing.assert_close(distance(x, x_hat), distance(x_hat, x))
    assert distance(x, x_hat)[0].item() == pytest.approx(distance(x[:1], x_hat[:1]).item())


def test_a_step_downhill_lowers_the_distance() -> None:
    torch.manual_seed(0)
    distance = PerceptualDistance(Inception((192,)).first_stages)
    x, x_hat = images(1), images(2).requires_grad_()
    before = distance(x, x_hat).sum()
    (gradient,) = torch.autograd.grad(before, x_hat)
    after = distance(x, x_hat - gradient / gradient.norm()).sum()
    assert after < before


def test_features_of_zero_have_a_finite_gradient() -> None:
    x_hat = torch.zeros(1, 2, 1, 1, requires_grad=True)
    PerceptualDistance(lambda x: [x])(torch.ones(1, 2, 1, 1), x_hat).sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()


def test_the_last_stage_is_the_layer_before_the_pool_that_features_are_read_from() -> None:
    """At 299 pixels no resizing intervenes."""
    torch.manual_seed(0)
    network = Inception((192,), "pytorch-fid")
    levels = torch.randint(0, 256, (1, 299, 299, 3), generator=torch.Generator().manual_seed(1))
    maps = network.first_stages(levels.permute(0, 3, 1, 2).float() / 255 * 2 - 1)
    assert [found.shape[1] for found in maps] == [32, 64, 192]
    pooled = F.max_pool2d(maps[-1], 3, stride=2).mean(dim=(2, 3))
    torch.testing.assert_close(pooled, network.features(levels.to(torch.uint8))[192])


def test_the_smallest_image_leaves_one_place_and_a_smaller_one_is_refused() -> None:
    network = Inception((192,))
    assert network.first_stages(images(1, side=19))[-1].shape[2:] == (1, 1)
    with pytest.raises(ValueError, match="at least 19 x 19 pixels"):
        network.first_stages(images(1, side=18))
