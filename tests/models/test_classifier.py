"""The classifier of noisy images: its start, its laws, and what it learns against Bayes' rule."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.process import NoiseSchedule, add_noise
from ddpm_ray.models.classifier import AttentionPool, NoisyClassifier
from ddpm_ray.models.layers import GUIDED, HO, Variant
from ddpm_ray.models.unet_spec import UNetSpec


def small(**changes: Any) -> NoisyClassifier:
    torch.manual_seed(0)
    form: dict[str, Any] = {
        "image_channels": 1,
        "num_classes": 3,
        "base_channels": 8,
        "channel_mults": (1, 2),
        "blocks_per_level": 1,
        "attention_factors": (2,),
        "groups": 4,
    }
    size = changes.pop("image_size", (8, 8))
    return NoisyClassifier(UNetSpec(**(form | changes)), size)


def disturbed(network: NoisyClassifier) -> NoisyClassifier:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([1, 10, 500, 1000])


@pytest.mark.parametrize("variant", [HO, replace(GUIDED, head_channels=4)])
def test_all_classes_are_alike_before_training_and_each_parameter_learns(variant: Variant) -> None:
    x_t, t = batch()
    assert torch.equal(small(variant=variant)(x_t, t), torch.zeros(4, 3))
    network = disturbed(small(variant=variant))
    F.cross_entropy(network(x_t, t), torch.tensor([0, 1, 2, 0])).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_an_image_is_judged_alone_as_in_its_batch_and_by_its_step() -> None:
    network, (x_t, t) = disturbed(small()), batch()
    alone = [network(x_t[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    torch.testing.assert_close(torch.cat(alone), network(x_t, t))
    assert (network(x_t, t) - network(x_t, t.flip(0))).abs().max() > 1e-3


def test_a_flat_softmax_pools_the_mean() -> None:
    """With query and key 0 all tokens weigh the same; the mean of mean and pixels is the mean."""
    pool = AttentionPool(8, 16, Variant(num_heads=2))
    with torch.no_grad():
        pool.query_key_value.weight[:16] = 0
        pool.query_key_value.weight[16:] = torch.eye(8)
        pool.position.zero_()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(pool(x), x.mean(dim=(2, 3)))


def test_the_pool_knows_where_a_pixel_lies_by_its_position_alone() -> None:
    torch.manual_seed(0)
    pool, x, order = AttentionPool(8, 16), torch.randn(2, 8, 4, 4), torch.randperm(16)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    assert (pool(shuffled) - pool(x)).abs().max() > 1e-3
    with torch.no_grad():
        pool.position.zero_()
    torch.testing.assert_close(pool(shuffled), pool(x))


def test_it_learns_the_odds_that_bayes_rule_gives() -> None:
    """Two classes, all pixels m or all -m: the log-odds of x_t are 2 sqrt(a) m sum(x_t) / (1 - a).

    Their gradient with respect to x_t, which guidance follows, is the same for every pixel.
    """
    generator = torch.Generator().manual_seed(3)
    schedule, m = NoiseSchedule(schedules.linear(1000)), 0.3

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(0, 2, (count,), generator=generator)
        x_0 = (m * (2.0 * labels - 1)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        t = torch.randint(100, 501, (count,), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        return add_noise(schedule, x_0, t, noise), t, labels

    network = small(image_size=(4, 4), num_classes=2)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(200):
        x_t, t, labels = draw(64)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(x_t, t), labels))
        optimizer.step()
    x_t, t, labels = draw(2000)
    x_t.requires_grad_()
    log_p = F.log_softmax(network(x_t, t), dim=1)
    a = schedule.at(t, x_t).float()
    odds = (2 * a.sqrt() * m / (1 - a)).flatten() * x_t.detach().sum(dim=(1, 2, 3))
    best = F.softplus(-odds * (2.0 * labels - 1)).mean().item()
    loss = F.nll_loss(log_p, labels).item()
    assert best < loss < best + 0.1 * (math.log(2) - best)
    (gradient,) = torch.autograd.grad(log_p[:, 1].sum(), x_t)
    direction = gradient.mean(dim=0).flatten()
    assert direction.mean() > 3 * direction.std()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_classes": 1}, "num_classes is 1; there must be at least 2"),
        ({"groups": 3}, "groups is 3, which does not divide"),
        ({"image_size": (9, 6)}, "images are 9 x 6, .* nearest valid: 8 x 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=20)
def test_images_need_not_be_square(levels: int, rows: int, columns: int) -> None:
    factor = 2 ** (levels - 1)
    size = rows * factor, columns * factor
    network = disturbed(small(image_size=size, channel_mults=(1,) * levels, attention_factors=()))
    logits = network(torch.randn(2, 1, *size), torch.tensor([1, 900]))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
