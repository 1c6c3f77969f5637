"""Each rule against its paper's number, and against itself under every other prediction."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.choices import Prediction
from ddpm_ray.diffusion import (
    NoiseSchedule,
    Parameterization,
    add_noise,
    loss_weighting,
    simple_loss,
)

KINDS: tuple[Prediction, ...] = get_args(Prediction)
RULES: list[Callable[[Parameterization], Tensor]] = [
    loss_weighting.min_snr,
    loss_weighting.soft_min_snr,
    loss_weighting.p2,
    loss_weighting.edm_weight,
]
NINE = NoiseSchedule(torch.tensor([1, 0.9, 0.1], dtype=torch.float64))  # SNR 9 and 1/9
SILENT = NoiseSchedule(torch.tensor([1, 0.5, 0], dtype=torch.float64))  # and none at T


@pytest.mark.parametrize("rule", RULES)
@given(beta=st.lists(st.floats(1e-3, 0.9), min_size=1, max_size=12))
def test_a_rule_is_one_loss_whatever_is_predicted(
    rule: Callable[[Parameterization], Tensor], beta: list[float]
) -> None:
    """The same wrong guess of x_0, put as each kind's answer, costs the same, image by image."""
    kept = torch.tensor([1, *(1 - b for b in beta)], dtype=torch.float64)
    schedule = NoiseSchedule(kept.cumprod(0))
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, schedule.num_steps + 1)
    x_0, noise, guess = torch.randn(3, len(t), 5, dtype=torch.float64, generator=generator)
    x_t = add_noise(schedule, x_0, t, noise)
    costs = []
    for kind in KINDS:
        parameterization = Parameterization.of(kind, schedule)
        model_output = parameterization.output_from_x0(x_t, t, guess)
        loss = simple_loss(
            lambda x, t, a=model_output: a,  # type: ignore[misc]
            schedule,
            x_0,
            t,
            noise,
            parameterization=parameterization,
        )
        costs.append(rule(parameterization)[t] * loss)
    for other in costs[1:]:
        torch.testing.assert_close(other, costs[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "rule, kind, at_nine, at_a_ninth",
    [
        (loss_weighting.min_snr, "x_0", 5, 1 / 9),  # min(SNR, 5); Hang et al. 2023, section 3.4,
        (loss_weighting.min_snr, "epsilon", 5 / 9, 1),  # over SNR
        (loss_weighting.min_snr, "v", 5 / 10, 1 / 10),  # and over SNR + 1
        (
            loss_weighting.soft_min_snr,
            "x_0",
            1 / (1 / 9 + 1 / 5),
            1 / (9 + 1 / 5),
        ),  # sigma^2 = 1 / SNR
        (loss_weighting.p2, "epsilon", 1 / 10, 9 / 10),  # 1 / (1 + SNR)
        (loss_weighting.edm_weight, "x_0", 9 + 4, 1 / 9 + 4),  # at sigma_data = 1/2
        # Karras et al. 2022, table 1: lambda = 1 / c_out^2.
        (loss_weighting.edm_weight, "edm", 1, 1),
    ],
)
def test_weights_are_what_the_papers_say(
    rule: Callable[[Parameterization], Tensor], kind: Prediction, at_nine: float, at_a_ninth: float
) -> None:
    weight = rule(Parameterization.of(kind, NINE))
    assert weight.dtype == torch.float64
    assert weight.tolist() == pytest.approx([0, at_nine, at_a_ninth])


def test_settings_reach_the_rules() -> None:
    image, noise = Parameterization.of("x_0", NINE), Parameterization.of("epsilon", NINE)
    assert loss_weighting.min_snr(image, gamma=8)[1].item() == pytest.approx(8)
    assert loss_weighting.soft_min_snr(image, gamma=9)[1].item() == pytest.approx(9 / 2)
    assert loss_weighting.p2(noise, k=7, gamma=0.5)[1].item() == pytest.approx(1 / 4)
    assert loss_weighting.p2(noise, gamma=0)[1:].tolist() == pytest.approx([1, 1])
    assert loss_weighting.edm_weight(image, sigma_data=1)[1].item() == pytest.approx(10)


@pytest.mark.parametrize("kind", ["v", "x_0", "mean", "edm"])
def test_a_step_without_signal_has_the_weight_of_no_snr(kind: Prediction) -> None:
    parameterization = Parameterization.of(kind, SILENT)
    for rule in (loss_weighting.min_snr, loss_weighting.soft_min_snr, loss_weighting.p2):
        assert rule(parameterization)[2] == 0
    assert loss_weighting.edm_weight(Parameterization.of("x_0", SILENT))[2] == 4


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda p: loss_weighting.min_snr(p, gamma=0), "gamma is 0"),
        (lambda p: loss_weighting.soft_min_snr(p, gamma=-1), "gamma is -1"),
        (lambda p: loss_weighting.p2(p, k=0), "k is 0"),
        (lambda p: loss_weighting.edm_weight(p, sigma_data=math.nan), "sigma_data is nan"),
    ],
)
def test_a_number_that_makes_no_weight_is_named(
    make: Callable[[Parameterization], Tensor], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}; it must be above 0$"):
        make(Parameterization.of("v", NINE))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_uncertainty_is_least_at_the_log_of_the_mean_loss(losses: list[float]) -> None:
    """There it is 1 + that logarithm and flat; a convex function has no other minimum."""
    loss = torch.tensor(losses, dtype=torch.float64)
    best = loss.mean().log().requires_grad_()
    least = loss_weighting.uncertain(loss, best.expand_as(loss)).mean()
    (slope,) = torch.autograd.grad(least, best)
    assert least.item() == pytest.approx(1 + math.log(sum(losses) / len(losses)))
    assert slope.item() == pytest.approx(0, abs=1e-12)
    for off in (-0.1, 0.1):
        assert loss_weighting.uncertain(loss, best + off).mean() > least
