"""Every kind of prediction against the process itself, and the score against an exact one."""

import math
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
    posterior,
    schedules,
    score,
)

KINDS: tuple[Prediction, ...] = get_args(Prediction)
betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12)
LINEAR = NoiseSchedule(schedules.linear(20, 1e-3, 0.3))


def from_beta(beta: list[float]) -> NoiseSchedule:
    alpha_bar = [1.0]
    for b in beta:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    return NoiseSchedule(torch.tensor(alpha_bar, dtype=torch.float64))


def drawn(schedule: NoiseSchedule, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, steps 1..T, and x_t."""
    t = torch.arange(1, schedule.num_steps + 1)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, len(t), *shape, dtype=torch.float64, generator=generator)
    return x_0, noise, t, add_noise(schedule, x_0, t, noise)


@pytest.mark.parametrize("kind", KINDS)
@given(beta=betas, shape=st.sampled_from([(2,), (3, 4, 4), (2, 3, 4, 4)]))
def test_the_right_answer_gives_back_image_and_noise(
    kind: Prediction, beta: list[float], shape: tuple[int, ...]
) -> None:
    schedule = from_beta(beta)
    x_0, noise, t, x_t = drawn(schedule, *shape)
    parameterization = Parameterization.of(kind, schedule)
    model_output = parameterization.target(x_0, t, noise)
    torch.testing.assert_close(
        parameterization.x_0(x_t, t, model_output), x_0, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        parameterization.output_from_x0(x_t, t, x_0), model_output, rtol=1e-6, atol=1e-6
    )
    if kind != "x_0":  # at t = 1 an image says little of a faint noise, and float64 less
        torch.testing.assert_close(
            parameterization.noise(x_t, t, model_output), noise, rtol=1e-6, atol=1e-6
        )


def test_targets_are_what_the_papers_say() -> None:
    """At one step, in numbers by hand: alpha_bar = 0.64, so x_t = 0.8 x_0 + 0.6 epsilon."""
    schedule = NoiseSchedule(torch.tensor([1, 0.64], dtype=torch.float64))
    x_0, noise, t = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([1])
    targets = {
        kind: Parameterization.of(kind, schedule).target(x_0, t, noise).item() for kind in KINDS
    }
    assert targets["epsilon"] == -1
    assert targets["x_0"] == 2
    assert targets["v"] == pytest.approx(0.8 * -1 - 0.6 * 2)
    assert targets["score"] == pytest.approx(1 / 0.6)
    assert targets["mean"] == pytest.approx(2)  # at t = 1 the step before is the image
    # Karras et al. 2022, table 1, with sigma_data = 0.5: F = (x_0 - c_skip x) / c_out
    sigma = 0.6 / 0.8
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    assert targets["edm"] == pytest.approx((2 - c_skip * (2 - sigma)) / c_out)


@given(betas)
def test_the_mean_is_that_of_the_posterior(beta: list[float]) -> None:
    schedule = from_beta(beta)
    x_0, noise, t, x_t = drawn(schedule, 2)
    target = Parameterization.of("mean", schedule).target(x_0, t, noise)
    torch.testing.assert_close(target, posterior(schedule, x_0, x_t, t)[0])


def test_edm_at_unit_deviation_is_minus_v() -> None:
    """Its network input is then x_t itself, too: Karras et al. 2022 and Salimans and Ho agree."""
    x_0, noise, t, _ = drawn(LINEAR, 3)
    edm, v = Parameterization.of("edm", LINEAR, sigma_data=1), Parameterization.of("v", LINEAR)
    torch.testing.assert_close(edm.target(x_0, t, noise), -v.target(x_0, t, noise))


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_unit_data_has_the_size_that_its_paper_names(kind: Prediction) -> None:
    """For independent x_0 and noise of variance 1, that of the target is u^2 + w^2."""
    parameterization = Parameterization.of(kind, LINEAR, sigma_data=1)
    size = (parameterization.u.square() + parameterization.w.square())[1:]
    if kind in ("epsilon", "x_0", "v", "edm"):
        torch.testing.assert_close(size, torch.ones_like(size))
    if kind == "score":
        torch.testing.assert_close(size, 1 / (1 - LINEAR.alpha_bar[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_gaussian_is_exact(kind: Prediction) -> None:
    """x_0 from N(0.6, 0.3^2) makes x_t Gaussian, whose log density has a known slope."""
    a = LINEAR.alpha_bar[1:, None]
    t = torch.arange(1, 21)
    x_t = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None].requires_grad_()
    law = torch.distributions.Normal(0.6 * a.sqrt(), (0.09 * a + 1 - a).sqrt())
    (slope,) = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    parameterization = Parameterization.of(kind, LINEAR)

    def optimum(x: Tensor, t: Tensor) -> Tensor:
        """The expected image of a Gaussian by the regression of x_0 on x_t, as an answer."""
        gain = 0.09 * a.sqrt() / (0.09 * a + 1 - a)
        return parameterization.output_from_x0(x, t, 0.6 + gain * (x - 0.6 * a.sqrt()))

    torch.testing.assert_close(score(parameterization, optimum, x_t.detach(), t), slope)


def test_v_and_x_0_say_what_the_image_is_where_no_signal_is_left() -> None:
    schedule = NoiseSchedule(torch.tensor([1, 0.5, 0.0], dtype=torch.float64))
    x_0, noise, t, x_t = drawn(schedule, 3)
    for kind in ("v", "x_0", "mean", "edm"):
        parameterization = Parameterization.of(kind, schedule)
        model_output = parameterization.target(x_0, t, noise)
        torch.testing.assert_close(parameterization.x_0(x_t, t, model_output), x_0)
    for kind in ("epsilon", "score"):
        with pytest.raises(
            ValueError, match=f"{kind!r}, which does not determine .* predict v or x_0"
        ):
            Parameterization.of(kind, schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_images_stay_float32(kind: Prediction) -> None:
    parameterization = Parameterization.of(kind, LINEAR)
    x, t = torch.randn(2, 3), torch.tensor([1, 20])
    for way in (
        parameterization.target,
        parameterization.x_0,
        parameterization.noise,
        parameterization.output_from_x0,
    ):
        if not (kind == "x_0" and way == parameterization.noise):
            assert way(x, t, x).dtype == torch.float32
