"""Samplers against laws that hold exactly: which noise is asked for, and what becomes of it.

A walk with a linear denoiser is linear in x_T and in each transition's noise. A batch in which row
i holds only source i therefore shows the variance at every step to float64: the sum of squares.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, Parameterization, add_noise, posterior, schedules
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.timestep_spacing import (
    log_snr_steps,
    noisiest_step,
    quadratic_steps,
    uniform_steps,
)
from ddpm_ray.diffusion.x0_estimator import Clip, X0Estimator, clip_to_quantile, clip_to_range

SCHEDULE = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
falling = st.sets(st.integers(1, 40), min_size=1).map(lambda t: (*sorted(t, reverse=True), 0))
EVERY_STEP = uniform_steps(40, 40)


def noise_at(t: int) -> Tensor:
    return torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


def shrinking(x_t: Tensor, t: Tensor) -> Tensor:
    """A denoiser as good as any for laws: bounded, not linear, and it looks at t."""
    return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 40)


class Sources:
    """x_T and the noise of each transition, one source a row; the variance at each step."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.row = {t: i + 1 for i, t in enumerate(steps[:-1])}
        self.x_T = torch.zeros(len(steps), 1, dtype=torch.float64)
        self.x_T[0] = 1
        self.variance: dict[int, float] = {}

    def noise(self, t: int) -> Tensor:
        impulse = torch.zeros_like(self.x_T)
        impulse[self.row[t]] = 1
        return impulse

    def on_step(self, t: int, x_t: Tensor, x_0: Tensor) -> None:
        self.variance[t] = float(x_t.square().sum())


@given(falling)
def test_fixed_large_keeps_unit_gaussian_data_exact(steps: tuple[int, ...]) -> None:
    """Data N(0, 1) is N(0, 1) at every step; fixed_large is its variance (Ho et al., 3.2)."""

    def optimum(x_t: Tensor, t: Tensor) -> Tensor:
        return (1 - SCHEDULE.at(t, x_t)).sqrt() * x_t

    source = Sources(steps)
    ancestral(
        X0Estimator(SCHEDULE, optimum, clip=None),
        source.x_T,
        steps,
        noise=source.noise,
        on_step=source.on_step,
    )
    assert list(source.variance) == list(steps[:-1])
    assert list(source.variance.values()) == pytest.approx([1.0] * (len(steps) - 1))


@given(falling, st.floats(0, 1))
def test_ddim_keeps_the_marginals_of_a_single_image_at_any_eta(
    steps: tuple[int, ...], eta: float
) -> None:
    """Data that is one image has variance 1 - alpha_bar at step t (Song et al. 2021, lemma 1)."""

    def optimum(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / (1 - SCHEDULE.at(t, x_t)).sqrt()  # the image is 0

    source = Sources(steps)
    source.x_T *= (1 - SCHEDULE.alpha_bar[steps[0]]).sqrt()
    end = ddim(
        X0Estimator(SCHEDULE, optimum),
        source.x_T,
        steps,
        eta=eta,
        noise=source.noise,
        on_step=source.on_step,
    )
    expected = [float(1 - SCHEDULE.alpha_bar[t]) for t in steps[:-1]]
    assert list(source.variance.values()) == pytest.approx(expected)
    assert end.abs().max() < 1e-12


@given(st.integers(1, 39), st.floats(0, 1))
def test_eta_scales_the_deviation_of_fresh_noise(s: int, eta: float) -> None:
    """eq. 16 is proportional to eta; where x_T is 0, only fresh noise is left at step s."""

    def deviation(eta: float) -> float:
        seen: dict[int, Tensor] = {}
        ddim(
            X0Estimator(SCHEDULE, lambda x_t, t: x_t),
            0 * noise_at(99),
            (40, s, 0),
            eta=eta,
            noise=noise_at,
            on_step=lambda t, x_t, x_0: seen.update({t: x_t.clone()}),
        )
        return float((seen[s] / noise_at(40)).mean())

    assert deviation(eta) == pytest.approx(eta * deviation(1), rel=1e-9)
    assert deviation(1) > 0


@given(falling, st.sampled_from([clip_to_range, clip_to_quantile(0.9), None]))
def test_ancestral_with_fixed_small_is_ddim_with_eta_1(
    steps: tuple[int, ...], clip: Clip | None
) -> None:
    one = ancestral(
        X0Estimator(SCHEDULE, shrinking, clip=clip),
        noise_at(99),
        steps,
        noise=noise_at,
        variance="fixed_small",
    )
    other = ddim(
        X0Estimator(SCHEDULE, shrinking, clip=clip), noise_at(99), steps, eta=1, noise=noise_at
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_ancestral_with_fixed_large_is_ddim_with_sigma_hat() -> None:
    one = ancestral(X0Estimator(SCHEDULE, shrinking), noise_at(99), EVERY_STEP, noise=noise_at)
    other = ddim(
        X0Estimator(SCHEDULE, shrinking),
        noise_at(99),
        EVERY_STEP,
        eta=1,
        noise=noise_at,
        variance="fixed_large",
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_each_ancestral_step_draws_from_the_posterior() -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    ancestral(
        X0Estimator(SCHEDULE, shrinking),
        noise_at(99),
        EVERY_STEP,
        noise=noise_at,
        variance="fixed_small",
        on_step=lambda t, x_t, x_0: seen.append((t, x_t.clone(), x_0.clone())),
    )
    for (t, x_t, x_0), (_, x_prev, _) in pairwise(seen):
        mean, variance = posterior(SCHEDULE, x_0, x_t, torch.full((3,), t))
        torch.testing.assert_close(x_prev, mean + variance.sqrt() * noise_at(t))


@given(falling)
def test_each_ddim_step_lands_on_the_clipped_image_with_its_own_noise(
    steps: tuple[int, ...],
) -> None:
    """At eta = 0, x_s is the clipped x_0 under the noise that took it to x_t (eq. 12)."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    end = ddim(
        X0Estimator(SCHEDULE, shrinking),
        5 * noise_at(99),
        steps,
        on_step=lambda t, x_t, x_0: seen.append((t, x_t.clone(), x_0.clone())),
    )
    assert seen[0][2].abs().max() == 1, "nothing was clipped"
    for (t, x_t, x_0), (s, x_s) in zip(
        seen, [(s, x_s) for s, x_s, _ in seen[1:]] + [(0, end)], strict=True
    ):
        noise = Parameterization.of("epsilon", SCHEDULE).output_from_x0(
            x_t, torch.full((3,), t), x_0
        )
        torch.testing.assert_close(x_s, add_noise(SCHEDULE, x_0, torch.full((3,), s), noise))


@pytest.mark.parametrize("sampler", [ancestral, partial(ddim, eta=1)])
def test_noise_is_asked_for_by_the_step_it_leaves_and_never_last(
    sampler: Callable[..., Tensor],
) -> None:
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return noise_at(t)

    sampler(X0Estimator(SCHEDULE, shrinking), noise_at(99), (40, 17, 3, 0), noise=noise)
    assert asked == [40, 17]


@pytest.mark.parametrize("sampler", [partial(ancestral, noise=noise_at), ddim])
def test_what_goes_in_is_kept_and_what_comes_out_is_an_ordinary_tensor(
    sampler: Callable[..., Tensor],
) -> None:
    x_T = noise_at(99).float().requires_grad_()
    end = sampler(X0Estimator(SCHEDULE, shrinking), x_T, (40, 10, 0))
    assert torch.equal(x_T, noise_at(99).float())
    assert end.dtype == torch.float32
    assert not end.requires_grad
    end += 1  # an inference tensor would refuse


def test_a_denoiser_may_take_gradients_with_respect_to_x_t() -> None:
    """As classifier guidance will: it leaves inference mode for its own part.

    Autograd saves t, the index of the table's rows, for the backward pass.
    """
    table = torch.nn.Embedding(41, 1, dtype=torch.float64)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                (shrinking(x, t).logsumexp((1, 2, 3)) * table(t)[:, 0]).sum(), x
            )
        return gradient

    assert ddim(X0Estimator(SCHEDULE, denoise), noise_at(99), (40, 10, 0)).isfinite().all()


@pytest.mark.parametrize(
    "steps, complaint",
    [
        ((), "steps are empty; they must fall from at most T to 0"),
        ((0,), "steps are 0; they must fall"),
        ((40, 30, 20, 10, 5, 1), r"steps are 40, 30, \.\.\., 5, 1; they must fall from .* to 0"),
        ((41, 0), "steps start at 41, but the schedule has T = 40 steps"),
        ((40, 10, 20, 0), "steps go from 10 to 20; they must fall strictly"),
        ((40, 10, 10, 0), "steps go from 10 to 10; they must fall strictly"),
        ((40, -1, 0), "steps go from -1 to 0; they must fall strictly"),
    ],
)
@pytest.mark.parametrize("sampler", [partial(ancestral, noise=noise_at), ddim])
def test_steps_that_do_not_fall_to_0_are_refused(
    sampler: Callable[..., Tensor], steps: tuple[int, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        sampler(X0Estimator(SCHEDULE, shrinking), noise_at(99), steps)


@pytest.mark.parametrize(
    "choice, complaint",
    [
        ({"eta": -0.5}, r"eta is -0\.5; it lies between 0"),
        ({"eta": 1.5}, r"eta is 1\.5; it lies between 0"),
        ({"eta": 0.5}, r"eta is 0\.5, so DDIM adds noise; pass noise=, or take eta=0"),
        (
            {"eta": 1, "noise": noise_at, "variance": "fixed_large"},
            r"fixed_large with 2 of 40 steps; DDIM then leaves noise in the images \(FID 367",
        ),
    ],
)
def test_ddim_refuses_what_spoils_images(choice: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ddim(X0Estimator(SCHEDULE, shrinking), noise_at(99), (40, 20, 0), **choice)


def test_ddim_refuses_sigma_hat_at_another_eta_than_1() -> None:
    with pytest.raises(ValueError, match=r"fixed_large with eta 0; .* take eta=1 or fixed_small"):
        ddim(X0Estimator(SCHEDULE, shrinking), noise_at(99), EVERY_STEP, variance="fixed_large")


@pytest.mark.parametrize("spacing", [uniform_steps, quadratic_steps])
@given(data=st.data(), num_steps=st.integers(1, 1000))
def test_spacings_fall_to_0_in_count_steps(
    spacing: Callable[[int, int], tuple[int, ...]], data: st.DataObject, num_steps: int
) -> None:
    count = data.draw(st.integers(1, num_steps))
    steps = spacing(num_steps, count)
    assert (len(steps), steps[0], steps[-1]) == (count + 1, num_steps, 0)
    assert all(s < t for t, s in pairwise(steps))


def test_spacings_by_hand() -> None:
    assert uniform_steps(1000, 4) == (1000, 750, 500, 250, 0)
    assert uniform_steps(10, 3) == (10, 6, 3, 0)
    assert quadratic_steps(1000, 4) == (1000, 562, 250, 62, 0)
    assert quadratic_steps(10, 6) == (10, 6, 4, 3, 2, 1, 0)  # 10, 6.9, 4.4, 2.5, 1.1, 0.3 without


@pytest.mark.parametrize("spacing", [uniform_steps, quadratic_steps])
@pytest.mark.parametrize("count", [0, 11])
def test_spacings_refuse_other_counts(
    spacing: Callable[[int, int], tuple[int, ...]], count: int
) -> None:
    with pytest.raises(ValueError, match=f"{count} sampling steps of T = 10; take 1 to 10"):
        spacing(10, count)


@pytest.mark.parametrize("kind", [schedules.cosine, schedules.linear, schedules.one_over_t])
@given(st.data(), st.integers(1, 300))
def test_steps_even_in_log_snr_fall_to_0_in_count_steps(
    kind: Callable[[int], Tensor], data: st.DataObject, num_steps: int
) -> None:
    if num_steps < 25 and kind is schedules.linear:
        num_steps += 25
    schedule = NoiseSchedule(kind(num_steps))
    count = data.draw(st.integers(1, num_steps))
    steps = log_snr_steps(schedule, count)
    assert (len(steps), steps[0], steps[-1]) == (count + 1, num_steps, 0)
    assert all(s < t for t, s in pairwise(steps))


def test_steps_even_in_log_snr_are_even_in_it() -> None:
    """Where a thousand steps leave a choice: gaps differ by no more than two neighbours."""
    schedule = NoiseSchedule(schedules.linear(1000))
    found = schedule.log_snr(torch.tensor(log_snr_steps(schedule, 8)[:-1]))
    assert (found.diff() / found.diff().mean()).tolist() == pytest.approx([1] * 7, abs=0.2)
    with pytest.raises(ValueError, match="1001 sampling steps of T = 1000; take 1 to 1000"):
        log_snr_steps(schedule, 1001)


def test_the_noisiest_step_is_the_last_below_its_sigma() -> None:
    schedule = NoiseSchedule(schedules.cosine(1000))
    t = noisiest_step(schedule, 80)
    sigma = (1 / schedule.alpha_bar - 1).sqrt()
    assert sigma[t] <= 80 < sigma[t + 1]
    assert noisiest_step(NoiseSchedule(schedules.linear(1000)), 1e6) == 1000
    assert noisiest_step(NoiseSchedule(schedules.one_over_t(9))) == 8
    assert log_snr_steps(schedule, 3, t)[0] == t
