"""What each loss hands to the denoiser, what it averages, and what its minimum is.

The truth is the mixtures of tests/truth.py; the optimum for the noise is in test_against_truth.
"""

import math

import pytest
import torch
from torch import Tensor

from ddpm_ray.choices import LearnedVariance, Prediction
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, add_noise, schedules, simple_loss
from ddpm_ray.diffusion.losses import hybrid_loss, vlb_loss
from tests.truth import LINE, ONE
from tests.truth import SCHEDULE as COSINE

SCHEDULE = NoiseSchedule(schedules.linear(10))
T = torch.tensor([1, 4, 10])


def test_each_image_has_its_own_step_and_its_own_loss() -> None:
    """Without noise, an answer of t at step t is off by t everywhere."""
    x_0, zero = torch.randn(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x_t, add_noise(SCHEDULE, x_0, T, zero))
        return t.view(-1, 1, 1, 1).expand_as(x_t)

    assert simple_loss(denoise, SCHEDULE, x_0, T, zero).tolist() == [1, 16, 100]


def test_an_answer_in_bfloat16_still_gives_a_loss_in_float32() -> None:
    """0.01^2 added to 1 would be lost in bfloat16; here each image's error is 1.01."""
    zero = torch.zeros(3, 2, 4, 4)
    loss = simple_loss(
        lambda x_t, t: torch.full_like(x_t, -1, dtype=torch.bfloat16),
        SCHEDULE,
        zero,
        T,
        zero + 0.01,
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((3,), 1.0201))


@pytest.mark.parametrize("t", [50, 300, 800])
@pytest.mark.parametrize("kind", ["epsilon", "x_0", "v", "edm"])
def test_the_expected_image_is_the_optimum_of_every_prediction(kind: Prediction, t: int) -> None:
    """Whatever is added to its answer costs the mean square of that, weighed by the density of x_t.

    The density is the mixture's own, integrated on a fine line; 4 standard errors at a fixed seed.
    """
    parameterization = Parameterization.of(kind, COSINE)
    generator, count = torch.Generator().manual_seed(t), 20_000
    x_0, steps = LINE.sample(count, generator), torch.full((count,), t)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    density = LINE.density(x, COSINE.alpha_bar[t].view(1, 1, 1))

    def loss(wave: float) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return (
                parameterization.output_from_x0(x_t, t, LINE.expected_image(x_t, t))
                + 0.3 * (wave * x_t).cos()
            )

        return simple_loss(denoise, COSINE, x_0, steps, noise, parameterization=parameterization)

    best = simple_loss(
        lambda x_t, t: parameterization.output_from_x0(x_t, t, LINE.expected_image(x_t, t)),
        COSINE,
        x_0,
        steps,
        noise,
        parameterization=parameterization,
    )
    for wave in (0.0, 1.0, 2.5):
        excess = loss(wave) - best
        error = excess.std() / math.sqrt(count)
        square = (0.3 * (wave * x).cos()).square().flatten()
        assert abs(excess.mean() - torch.trapezoid(density * square, x.flatten())) < 4 * error
        assert excess.mean() > 4 * error


VARIANCES: tuple[LearnedVariance, ...] = ("learned", "learned_range")
V = Parameterization.of("v", SCHEDULE)
EVERY_T = torch.arange(1, 11)


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    """Images with values of 8-bit ones, noise, and what a network might answer, two for one."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(256, (10, 2, 4, 4), generator=generator).double()
    noise = torch.randn(10, 2, 4, 4, dtype=torch.float64, generator=generator)
    model_output = torch.randn(10, 4, 4, 4, dtype=torch.float64, generator=generator) / 2
    return levels / 127.5 - 1, noise, model_output.requires_grad_()


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_hybrid_trains_the_mean_as_the_simple_loss_and_the_variance_as_the_bound(
    variance: LearnedVariance,
) -> None:
    x_0, noise, both = pictures()

    def gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
        (slope,) = torch.autograd.grad(loss.sum(), both)
        return slope[:, :2], slope[:, 2:]

    hybrid = hybrid_loss(
        lambda x_t, t: both, V, x_0, EVERY_T, noise, variance=variance, vlb_weight=0.03
    )
    simple = simple_loss(
        lambda x_t, t: both[:, :2], SCHEDULE, x_0, EVERY_T, noise, parameterization=V
    )
    vlb = vlb_loss(lambda x_t, t: both, V, x_0, EVERY_T, noise, variance=variance)
    torch.testing.assert_close(hybrid, simple + 0.03 * vlb)
    mean, log_variance = gradient(hybrid)
    assert torch.equal(mean, gradient(simple)[0])
    of_mean, of_variance = gradient(vlb)
    torch.testing.assert_close(log_variance, 0.03 * of_variance)
    for slope in (of_mean, of_variance):  # at every step, t = 1 too
        assert (slope.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_is_least_at_the_true_variance_of_the_step_back(
    variance: LearnedVariance,
) -> None:
    """For a Gaussian that is var(x_{t-1}) beta / var(x_t), by the rule for jointly Gaussian pairs.

    The loss is then T / 2 log2 of it over the posterior's variance. Means are exact: where a loss
    is quadratic in x_0 and noise, two points to either side of the mean stand for each.
    """
    parameterization, a = Parameterization.of("epsilon", SCHEDULE), SCHEDULE.alpha_bar
    spread = a * ONE.variance.item() + 1 - a
    beta = 1 - a[2:] / a[1:-1]
    truth, small = beta * spread[1:-1] / spread[2:], beta * (1 - a[1:-1]) / (1 - a[2:])
    best = truth.log()
    if variance == "learned_range":  # from log small at -1 to log beta at 1
        best = 2 * (truth / small).log() / (beta / small).log() - 1
        assert (best.abs() < 1).all()

    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    t = torch.arange(2, 11).repeat_interleave(4)
    x_0 = (ONE.mean + ONE.variance.sqrt() * signs[:, :1]).repeat(9, 1)

    def loss(raw: Tensor) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            noise = ONE.expected_noise(x_t, t, SCHEDULE)
            return torch.cat([noise, raw.repeat_interleave(4)[:, None]], 1)

        each = vlb_loss(
            denoise, parameterization, x_0, t, signs[:, 1:].repeat(9, 1), variance=variance
        )
        return each.view(9, 4).mean(1)

    best.requires_grad_()
    least = loss(best)
    torch.testing.assert_close(least, 10 / 2 * (truth / small).log2())
    (slope,) = torch.autograd.grad(least.sum(), best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    for off in (-0.2, 0.2):
        assert (loss(best + off) > least).all()


def test_a_learned_variance_in_bfloat16_is_worked_with_in_float32() -> None:
    """The answer itself is rounded; what is made of it is as exact as of the same in float32."""
    x_0, noise, both = (x.detach().float() for x in pictures())
    rounded = both.bfloat16()
    ways = [
        hybrid_loss(
            lambda x_t, t, a=model_output: a,  # type: ignore[misc]
            V,
            x_0,
            EVERY_T,
            noise,
            variance="learned_range",
        )
        for model_output in (rounded, rounded.float())
    ]
    assert ways[0].dtype == torch.float32
    assert torch.equal(*ways)


def test_a_network_that_answers_no_variance_is_named() -> None:
    x_0, noise, both = pictures()
    with pytest.raises(ValueError, match=r"has 2 channels for 2 of x_t; .* 4: widen it"):
        vlb_loss(lambda x_t, t: both[:, :2], V, x_0, EVERY_T, noise, variance="learned")
