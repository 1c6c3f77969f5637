"""Every term of the bound against torch's divergences, fifty digits and a law known in full."""

import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_ray.choices import ReverseVariance
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, add_noise, posterior, schedules
from ddpm_ray.diffusion.schedule_diagnostics import diagnose_schedule
from ddpm_ray.diffusion.vlb import (
    decoder_log_probability,
    prior_term,
    reverse_log_variance,
    term,
)
from ddpm_ray.diffusion.x0_estimator import clip_to_range
from tests.truth import LINE

LINEAR = NoiseSchedule(schedules.linear(1000))
IMAGE = Parameterization.of("x_0", LINEAR)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The decoder


@given(mean=st.floats(-100, 100), log_variance=st.floats(-40, 40))
def test_the_decoder_gives_all_its_mass_to_the_grey_levels(
    mean: float, log_variance: float
) -> None:
    """The bins tile the line, so whatever the Gaussian their 256 masses sum to 1.

    Up to the rounding of a level's distance from the mean, in deviations.
    """
    log_mass = decoder_log_probability(
        LEVELS, torch.full_like(LEVELS, mean), torch.full_like(LEVELS, log_variance)
    )
    rounding = 4 * torch.finfo(torch.float64).eps * (1 + abs(mean)) * math.exp(-log_variance / 2)
    assert float(log_mass.logsumexp(0)) == pytest.approx(0, abs=1e-12 + rounding)


def exact_log_mass(level: int, mean: float, log_variance: float) -> float:
    """By mpmath's own erfc, with digits enough for the far tail."""
    deviation = math.exp(log_variance / 2)
    with mpmath.workdps(60 + int(((LEVELS[level].item() - mean) / deviation) ** 2)):
        x, scale = mpmath.mpf(2 * level - 255) / 255, mpmath.exp(-mpmath.mpf(log_variance) / 2)
        ends = [(x + side * mpmath.mpf(1) / 255 - mean) * scale for side in (-1, 1)]
        if level == 0:
            ends[0] = -mpmath.inf
        if level == 255:
            ends[1] = mpmath.inf
        low, high = sorted(abs(end) if ends[0] * ends[1] > 0 else end for end in ends)
        return float(
            mpmath.log((mpmath.erfc(low / mpmath.sqrt(2)) - mpmath.erfc(high / mpmath.sqrt(2))) / 2)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_decoder_keeps_its_digits_in_the_tails(dtype: torch.dtype) -> None:
    """Wide and narrow Gaussians, levels at their centre and 30 deviations out, and the open ends.

    A plain difference of two cumulative values is 0 there; float32's logarithm would be wrong by
    log(1e-12), the usual clamp.
    """
    checked = 0
    for level in (0, 1, 128, 200, 255):
        for mean in (-3.0, -0.5, 0.0, 0.125, 1.0):
            for log_variance in (-12.0, -9.75, -6.0, 0.0, 8.0):
                x = (2 * level - 255) / 255
                if abs(x - mean) * math.exp(-log_variance / 2) > 30:
                    continue
                found = decoder_log_probability(
                    torch.tensor([x], dtype=dtype),
                    torch.tensor([mean], dtype=dtype),
                    torch.tensor([log_variance], dtype=dtype),
                )
                truth = exact_log_mass(level, mean, log_variance)
                # the level itself is rounded to the type, which the distance in deviations feels
                slope = abs(x - mean) * math.exp(-log_variance) + math.exp(-log_variance / 2)
                bound = 4 * torch.finfo(dtype).eps * (1 + abs(truth) + slope)
                assert abs(float(found) - truth) < bound, (level, mean, log_variance)
                checked += 1
    assert checked > 60


@given(mean=st.floats(-2, 2), log_variance=st.floats(-14, 4), level=st.integers(0, 255))
def test_the_decoders_slopes_are_right_on_both_sides_of_its_seams(
    mean: float, log_variance: float, level: int
) -> None:
    """The mass's derivative is that of the two ends' densities, by hand from torch's Normal."""
    m, v = column([mean]).requires_grad_(), column([log_variance]).requires_grad_()
    value = decoder_log_probability(LEVELS[level : level + 1], m, v)
    by_mean, by_log_variance = torch.autograd.grad(value.sum(), (m, v))
    law = Normal(m.detach(), (v.detach() / 2).exp())
    at = [LEVELS[level : level + 1] + side / 255 for side in (-1, 1)]
    below = math.exp(law.log_prob(at[0]).item() - value.item()) if level > 0 else 0.0
    above = math.exp(law.log_prob(at[1]).item() - value.item()) if level < 255 else 0.0
    assert by_mean.item() == pytest.approx(below - above, rel=1e-7, abs=1e-7 * (below + above))
    low, high = ((end.item() - mean) / 2 for end in at)
    assert by_log_variance.item() == pytest.approx(
        low * below - high * above, rel=1e-7, abs=1e-7 * (abs(low) * below + abs(high) * above)
    )


# Terms


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@given(t=st.integers(2, 1000), x_0=st.floats(-1, 1), x_t=st.floats(-4, 4), guess=st.floats(-2, 2))
def test_a_term_is_torchs_divergence(
    variance: ReverseVariance, t: int, x_0: float, x_t: float, guess: float
) -> None:
    """From the posterior, its variance as it stands, to the Gaussian about the guess's mean."""
    x, steps = column([[x_0]]), torch.tensor([t])  # type: ignore[list-item]
    noisy, estimate = column([[x_t]]), column([[guess]])  # type: ignore[list-item]
    mean, small = posterior(LINEAR, x, noisy, steps)
    guessed, _ = posterior(LINEAR, estimate, noisy, steps)
    beta = 1 - LINEAR.alpha_bar[t] / LINEAR.alpha_bar[t - 1]
    chosen = small if variance == "fixed_small" else beta
    truth = kl_divergence(Normal(mean, small.sqrt()), Normal(guessed, chosen.sqrt()))
    log_variance = reverse_log_variance(LINEAR, steps, variance, x)
    assert log_variance.exp().item() == pytest.approx(float(chosen), rel=1e-12)
    found = term(IMAGE, x, noisy, steps, estimate, log_variance)
    assert found.item() * math.log(2) == pytest.approx(truth.item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v", "score"])
def test_a_term_knows_what_the_network_predicts(kind: str) -> None:
    parameterization = Parameterization.of(kind, LINEAR)  # type: ignore[arg-type]
    t = torch.tensor([1, 2, 500, 1000])
    x_0, x_t, estimate = torch.rand(3, 4, 5, dtype=torch.float64) * 2 - 1
    log_variance = reverse_log_variance(LINEAR, t, "fixed_large", x_0)
    model_output = parameterization.output_from_x0(x_t, t, estimate)
    found = term(parameterization, x_0, x_t, t, model_output, log_variance)
    torch.testing.assert_close(found, term(IMAGE, x_0, x_t, t, estimate, log_variance))
    outside = term(
        parameterization,
        x_0,
        x_t,
        t,
        parameterization.output_from_x0(x_t, t, 3 + 0 * x_0),
        log_variance,
        clip=clip_to_range,
    )
    torch.testing.assert_close(
        outside, term(IMAGE, x_0, x_t, t, torch.ones_like(x_0), log_variance)
    )


def test_the_first_term_decodes_from_the_estimate_itself() -> None:
    """Four pixels at t = 1: their mean is -log2 of the decoder's masses, in mpmath."""
    level, guess = torch.tensor([[0, 7, 200, 255]]), column([-0.99, -0.95, 0.56, 0.9])[None]
    t = torch.tensor([1])
    log_variance = reverse_log_variance(LINEAR, t, "fixed_small", guess)
    small = posterior(LINEAR, guess, guess, torch.tensor([2]))[1]  # not t = 1's own, which is 0
    assert log_variance.item() == pytest.approx(math.log(small.item()), rel=1e-12)
    truth = [
        -exact_log_mass(int(k), float(m), log_variance.item()) / math.log(2) / 4
        for k, m in zip(level[0], guess[0], strict=True)
    ]
    found = term(IMAGE, LEVELS[level], 0 * guess, t, guess, log_variance)
    assert found.item() == pytest.approx(sum(truth), rel=1e-12)


def test_the_chosen_variances() -> None:
    """Beta and the posterior's of a schedule by hand: alpha_bar 1, 0.8, 0.4, 0."""
    schedule = NoiseSchedule(column([1, 0.8, 0.4, 0.0]))
    t, like = torch.tensor([1, 2, 3]), torch.zeros(3, 2, dtype=torch.float64)
    small = [0.5 * 0.2 / 0.6, 0.5 * 0.2 / 0.6, 0.6]
    of = partial(reverse_log_variance, schedule, t)
    assert of("fixed_small", like).shape == (3, 1)
    assert of("fixed_small", like).exp().flatten().tolist() == pytest.approx(small)
    assert of("fixed_large", like).exp().flatten().tolist() == pytest.approx([small[1], 0.5, 1])
    raw = column([[-1, 1], [-1, 1], [-1, 1]])  # type: ignore[list-item]
    between = of("learned_range", like, raw).exp()
    assert between[:, 0].tolist() == pytest.approx(small)
    assert between[:, 1].tolist() == pytest.approx([0.2, 0.5, 1])
    assert of("learned", like, raw) is raw
    with pytest.raises(ValueError, match="variance is learned_range; pass raw="):
        of("learned_range", like)
    one = NoiseSchedule(column([1, 0.36]))
    for variance in ("fixed_small", "fixed_large"):
        found = reverse_log_variance(one, torch.tensor([1]), variance, like[:1])
        assert found.exp().item() == pytest.approx(0.64)


@pytest.mark.parametrize("t", [2, 300, 1000])
def test_no_estimate_and_no_variance_cost_less_than_the_posteriors_own(t: int) -> None:
    """At the image and the posterior's variance the term is 0, and its slopes are."""
    x_0, steps = column([[0.3, -0.8]]), torch.tensor([t])  # type: ignore[list-item]
    estimate = x_0.clone().requires_grad_()
    log_variance = reverse_log_variance(LINEAR, steps, "fixed_small", x_0).requires_grad_()

    def cost(moved: float, widened: float) -> Tensor:
        return term(IMAGE, x_0, x_0, steps, estimate + moved, log_variance + widened)

    best = cost(0, 0)
    assert best.item() == 0
    for slope in torch.autograd.grad(best.sum(), (estimate, log_variance)):
        assert slope.abs().max() < 1e-12
    for moved, widened in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)]:
        assert cost(moved, widened).item() > 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-40.0, -12.0, 0.0, 40.0])
@pytest.mark.parametrize("estimate", [-1e8, -1e4, -1.0, 0.0, 1.0, 1e4, 1e8])
def test_extreme_answers_have_finite_terms_and_slopes(
    estimate: float, log_variance: float, dtype: torch.dtype
) -> None:
    """A batch with t = 1 and other steps in it: neither formula leaks NaN into the other's rows."""
    t = torch.tensor([1, 1, 1, 2, 1000])
    x_0 = torch.tensor([-1.0, 1.0, 1 / 255, 1.0, 0.0], dtype=dtype)[:, None]
    guess = torch.full_like(x_0, estimate).requires_grad_()
    width = torch.full_like(x_0, log_variance).requires_grad_()
    bits = term(IMAGE, x_0, torch.zeros_like(x_0), t, guess, width)
    assert bits.dtype == dtype
    assert bits.isfinite().all()
    for slope in torch.autograd.grad(bits.sum(), (guess, width)):
        assert slope.isfinite().all()


# The whole bound


@given(
    x=st.lists(st.floats(-1, 1), min_size=1, max_size=9), num_steps=st.sampled_from([1, 20, 1000])
)
def test_the_prior_term_is_torchs_divergence(x: list[float], num_steps: int) -> None:
    schedule = NoiseSchedule(schedules.linear(num_steps))
    x_0, a = column(x), schedule.alpha_bar[-1]
    truth = kl_divergence(Normal(a.sqrt() * x_0, (1 - a).sqrt()), Normal(0.0, 1.0)).mean()
    found = prior_term(schedule, x_0[None])
    assert found.shape == (1,)
    assert found.item() * math.log(2) == pytest.approx(truth.item(), rel=1e-9, abs=1e-12)
    expected = diagnose_schedule(
        schedule, max(x_0.square().mean().item(), 1e-12), 1
    ).prior_bits_per_dim
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_published_schedule_begins_with_next_to_no_bits() -> None:
    """Ho et al. 2020, section 4: L_T is about 1e-5 bits per dimension; at E[x^2] = 1 it is most."""
    assert prior_term(LINEAR, torch.ones(1, 8)).item() == pytest.approx(2.9112e-5, rel=1e-3)
    no_signal = NoiseSchedule(column([1, 0.5, 0.0]))
    assert prior_term(no_signal, torch.ones(1, 8)).item() == 0


def grey_law(levels: Tensor) -> Tensor:
    """The probability of each level when LINE, shrunk twelvefold, is rounded to them."""
    edges = 12 * torch.cat([levels - 1 / 255, levels[-1:] + 1 / 255])[:, None]
    below = torch.special.ndtr((edges - LINE.mean.T) / LINE.variance.sqrt().T) @ LINE.weight
    mass: Tensor = below.diff()
    return mass / mass.sum()


def bound_bits(num_steps: int, levels: Tensor, probability: Tensor) -> float:
    """The mean of the whole bound over the data and all noise, by quadrature.

    The denoiser is the expectation of x_0 over the levels themselves, the best that there is.
    """
    schedule = NoiseSchedule(schedules.cosine(num_steps))
    parameterization = Parameterization.of("x_0", schedule)
    noise = torch.linspace(-6, 6, 31, dtype=torch.float64)
    weight = torch.softmax(-noise.square() / 2, 0)
    x_0 = levels.repeat_interleave(len(noise))[:, None]
    share = (probability[:, None] * weight).flatten()
    total = probability @ prior_term(schedule, levels[:, None])
    for step in range(1, num_steps + 1):
        t, a = torch.full((len(x_0),), step), schedule.alpha_bar[step]
        x_t = add_noise(schedule, x_0, t, noise.repeat(len(levels))[:, None])
        square = (x_t - a.sqrt() * levels).square() / (1 - a)
        estimate = (torch.softmax(probability.log() - square / 2, 1) @ levels)[:, None]
        log_variance = reverse_log_variance(schedule, t, "fixed_small", x_0)
        total += share @ term(parameterization, x_0, x_t, t, estimate, log_variance)
    return float(total)


def test_the_bound_lies_above_the_entropy_and_comes_nearer_with_more_steps() -> None:
    """Of a mixture in 64 grey levels; no code is shorter than the entropy (Shannon)."""
    levels = LEVELS[96:160]
    probability = grey_law(levels)
    entropy = -float(torch.special.xlogy(probability, probability).sum()) / math.log(2)
    gaps = [bound_bits(steps, levels, probability) - entropy for steps in (4, 16, 64, 256)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] > 0
    assert gaps[0] > 2 * gaps[-1]
