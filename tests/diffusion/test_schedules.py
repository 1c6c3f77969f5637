"""Schedules against fifty digits, and what a schedule refuses."""

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, add_noise, schedules

Kind = Callable[[int], Tensor]

# Each kind as a function of T alone, and those whose steps are also steps of a multiple of T.
KINDS: dict[str, Kind] = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "constant": lambda num_steps: schedules.constant(num_steps, 0.02),
    "warmup10": lambda num_steps: schedules.warmup(num_steps, 1e-4, 0.02, 0.1),
    "warmup50": lambda num_steps: schedules.warmup(num_steps, 1e-4, 0.02, 0.5),
    "one_over_t": schedules.one_over_t,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "laplace": schedules.laplace,
    "edm": schedules.edm,
    "given": lambda num_steps: schedules.from_betas([0.01] * (num_steps - 1) + [1.0]),
}
REFINED = ["one_over_t", "cosine", "sigmoid", "laplace"]


@pytest.mark.parametrize("kind", KINDS)
@given(num_steps=st.integers(1, 1500))
def test_every_length_is_a_noise_schedule(kind: str, num_steps: int) -> None:
    """NoiseSchedule raises unless it is float64, begins at 1, falls at each step and ends >= 0."""
    assert NoiseSchedule(KINDS[kind](num_steps)).num_steps == num_steps


@pytest.mark.parametrize("kind", KINDS)
@given(num_steps=st.integers(2, 1500))
def test_every_kind_can_end_without_signal_and_stay_in_order(kind: str, num_steps: int) -> None:
    """Again by what NoiseSchedule accepts; a second time changes nothing."""
    before = KINDS[kind](num_steps)
    after = schedules.zero_terminal_snr(before)
    assert NoiseSchedule(after).num_steps == num_steps
    assert after[:2].tolist() == before[:2].tolist()
    assert after[-1] == 0
    twice = schedules.zero_terminal_snr(after)
    torch.testing.assert_close(twice, after, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", REFINED)
@given(num_steps=st.integers(2, 100), finer=st.integers(2, 6))
def test_a_finer_schedule_passes_the_same_noise(kind: str, num_steps: int, finer: int) -> None:
    """What depends on t/T alone has each of its steps again in a multiple of T, but for a cap."""
    coarse, fine = KINDS[kind](num_steps), KINDS[kind](num_steps * finer)[::finer]
    torch.testing.assert_close(fine[:-1], coarse[:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "kind, snr, root",
    [
        ("linear", 4.035993e-05, 0.006353),
        ("cosine", 2.428735e-09, 4.928220e-05),
        ("scaled_linear", 0.004682, 0.068265),
    ],
)
def test_the_last_steps_are_the_published_ones(kind: str, snr: float, root: float) -> None:
    """SNR and sqrt(alpha_bar) at T = 1000 as Lin et al. 2023, arXiv:2305.08891, table 1, has."""
    a = KINDS[kind](1000)[-1].item()
    assert a / (1 - a) == pytest.approx(snr, rel=1e-4)
    assert math.sqrt(a) == pytest.approx(root, rel=1e-4)


def test_linear_ends_where_fifty_digits_say() -> None:
    with mpmath.workdps(50):
        beta = [mpmath.mpf("1e-4") + k * mpmath.mpf("0.0199") / 999 for k in range(1000)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert reference == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedules.linear(1000)[-1].item() == pytest.approx(reference, rel=1e-12)


def test_rescaled_linear_is_as_dark_in_a_quarter_of_the_steps() -> None:
    with mpmath.workdps(50):
        beta = [mpmath.mpf("4e-4") + k * mpmath.mpf("0.0796") / 249 for k in range(250)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert schedules.linear(250, rescale=True)[-1].item() == pytest.approx(reference, rel=1e-12)
    assert schedules.linear(250)[-1].item() > 1000 * reference, "only the explicit choice rescales"


def test_cosine_follows_fifty_digits_until_the_cap() -> None:
    with mpmath.workdps(50):
        angle = [
            (mpmath.mpf(t) / 1000 + mpmath.mpf("0.008")) / mpmath.mpf("1.008") for t in range(1001)
        ]
        f = [mpmath.cos(mpmath.pi / 2 * share) ** 2 for share in angle]
        reference = [float(value / f[0]) for value in f[:1000]]
        reference.append(reference[-1] * (1 - 0.999))  # f(T) = 0, so beta_T would be 1
    found = schedules.cosine(1000)
    assert found.tolist() == pytest.approx(reference, rel=1e-9)


def test_scaled_linear_ends_where_fifty_digits_say() -> None:
    with mpmath.workdps(50):
        first, last = mpmath.sqrt(mpmath.mpf("0.00085")), mpmath.sqrt(mpmath.mpf("0.012"))
        beta = [(first + k * (last - first) / 999) ** 2 for k in range(1000)]
        reference = float(mpmath.fprod(1 - b for b in beta))
    assert reference == pytest.approx(4.66e-3, rel=1e-3)
    assert schedules.scaled_linear(1000)[-1].item() == pytest.approx(reference, rel=1e-12)


def test_scaled_linear_is_rescaled_as_linear_is() -> None:
    """A constant beta has an evenly spaced root too, so there the two schedules are one."""
    beta = 0.01
    flat = schedules.linear(250, beta, beta, rescale=True)
    assert schedules.scaled_linear(250, beta, beta, rescale=True).tolist() == pytest.approx(
        flat.tolist(), rel=1e-12
    )


def test_sigmoid_follows_fifty_digits_until_the_cap() -> None:
    with mpmath.workdps(50):

        def logistic(x: mpmath.mpf) -> mpmath.mpf:
            return 1 / (1 + mpmath.exp(-x))

        at = [mpmath.mpf(-3) + mpmath.mpf(6) * t / 1000 for t in range(1001)]
        low, high = logistic(at[0]), logistic(at[-1])
        reference = [float((high - logistic(x)) / (high - low)) for x in at[:1000]]
    found = schedules.sigmoid(1000).tolist()
    assert found[:1000] == pytest.approx(reference, rel=1e-9)
    assert found[1000] == pytest.approx(reference[-1] * (1 - 0.999), rel=1e-9)


@given(num_steps=st.integers(2, 400), end=st.floats(0.5, 6), tau=st.floats(0.3, 3))
def test_a_sigmoid_seen_from_both_sides_alike_is_symmetric(
    num_steps: int, end: float, tau: float
) -> None:
    """As much image is left t steps after the start as is gone t steps before the end."""
    a = schedules.sigmoid(num_steps, -end, end, tau)[:-1]  # before the cap
    inner = a[1:]
    assert inner.tolist() == pytest.approx((1 - inner.flip(0)).tolist(), abs=1e-9)


def test_a_sigmoid_stretched_far_is_a_straight_line() -> None:
    a = schedules.sigmoid(100, tau=1e4)
    assert a[:-1].tolist() == pytest.approx([1 - t / 100 for t in range(100)], abs=1e-6)


@given(num_steps=st.integers(1, 200), beta=st.floats(1e-4, 0.9))
def test_a_constant_keeps_the_same_part_at_each_step(num_steps: int, beta: float) -> None:
    """The closed form (1 - beta)^t in fifty digits."""
    with mpmath.workdps(50):
        reference = [float((1 - mpmath.mpf(beta)) ** t) for t in range(num_steps + 1)]
    assert schedules.constant(num_steps, beta).tolist() == pytest.approx(reference, rel=1e-11)


@pytest.mark.parametrize("share, rising", [(0.1, 100), (0.5, 500)])
def test_warmup_follows_fifty_digits(share: float, rising: int) -> None:
    """'warmup10' and 'warmup50' of Ho et al. at T = 1000: the product of each step's 1 - beta."""
    with mpmath.workdps(50):
        first, last = mpmath.mpf("1e-4"), mpmath.mpf("0.02")
        reference = [mpmath.mpf(1)]
        for k in range(1000):
            risen = mpmath.mpf(min(k, rising - 1)) / (rising - 1)
            reference.append(reference[-1] * (1 - first - risen * (last - first)))
    found = schedules.warmup(1000, 1e-4, 0.02, share)
    assert found.tolist() == pytest.approx([float(a) for a in reference], rel=1e-11)


@given(
    num_steps=st.integers(1, 300),
    ends=st.lists(st.floats(1e-5, 0.5), min_size=2, max_size=2).map(sorted),
)
def test_warmup_lies_between_a_constant_and_a_line(num_steps: int, ends: list[float]) -> None:
    """Its two limits: nothing rises, or all does."""
    low, high = ends
    none, all_of_it = (schedules.warmup(num_steps, low, high, share) for share in (0, 1))
    assert none.tolist() == schedules.constant(num_steps, high).tolist()
    assert all_of_it.tolist() == schedules.linear(num_steps, low, high).tolist()


@given(num_steps=st.integers(1, 400))
def test_one_over_t_is_a_straight_line_to_the_last_bit(num_steps: int) -> None:
    """The exact product of 1 - 1/(T - t + 1), in fractions, each rounded once."""
    left, reference = Fraction(1), [1.0]
    for t in range(1, num_steps + 1):
        left *= 1 - Fraction(1, num_steps - t + 1)
        reference.append(float(left))
    assert schedules.one_over_t(num_steps).tolist() == reference


laplace_of = {"mean": st.floats(-3, 3), "scale": st.floats(0.1, 2)}


@given(num_steps=st.integers(2, 400), **laplace_of)
def test_steps_of_laplace_are_its_quantiles(num_steps: int, mean: float, scale: float) -> None:
    """Against scipy's Laplace distribution: a share t/T of it lies above step t's log-SNR."""
    schedule = NoiseSchedule(schedules.laplace(num_steps, mean, scale))
    t = torch.arange(1, num_steps)
    above = stats.laplace(mean, scale).sf(schedule.log_snr(t).numpy())
    assert above.tolist() == pytest.approx((t / num_steps).tolist(), rel=1e-6)


@given(num_steps=st.integers(1, 400), scale=st.floats(0.1, 2))
def test_a_laplace_around_0_is_symmetric(num_steps: int, scale: float) -> None:
    """As much image is left at t as is gone at T - t; only the last step is capped."""
    a = schedules.laplace(num_steps, 0, scale)
    assert a[1:-1].tolist() == pytest.approx((1 - a[1:-1].flip(0)).tolist(), abs=1e-12)
    assert a[-1].item() == pytest.approx(a[-2].item() / 1000, rel=1e-12)


def test_edm_follows_fifty_digits() -> None:
    """Karras et al. 2022, eq. 5, i = 0..17 from the noisiest: the grid of their 18 steps."""
    with mpmath.workdps(50):
        rho, low, high = mpmath.mpf(7), mpmath.mpf("0.002"), mpmath.mpf(80)
        first, last = high ** (1 / rho), low ** (1 / rho)
        sigma = [(first + mpmath.mpf(i) / 17 * (last - first)) ** rho for i in range(18)]
        reference = [float(1 / (1 + s**2)) for s in reversed(sigma)]
        clean = float(1 - 1 / (1 + low**2))
    found = schedules.edm(18)
    assert found.tolist() == pytest.approx([1.0, *reference], rel=1e-12)
    assert found[-1].item() == pytest.approx(1 / 6401, rel=1e-12)  # sigma 80
    assert (1 - found[1]).item() == pytest.approx(clean, rel=1e-9)  # sigma 0.002
    assert schedules.edm(1)[-1].item() == pytest.approx(1 / 6401, rel=1e-12)


@given(num_steps=st.integers(3, 300), low=st.floats(1e-3, 0.1), high=st.floats(1, 100))
def test_edm_spaces_sigma_at_rho_1_and_its_logarithm_at_a_large_rho(
    num_steps: int, low: float, high: float
) -> None:
    """Both limits of eq. 5, seen through log-SNR = -2 log sigma: evenly spaced, end to end."""
    t = torch.arange(1, num_steps + 1)
    even, log_even = (
        (NoiseSchedule(schedules.edm(num_steps, low, high, rho)).log_snr(t) / -2).exp()
        for rho in (1, 1e5)
    )
    line = torch.linspace(low, high, num_steps, dtype=torch.float64)
    torch.testing.assert_close(even, line, rtol=1e-6, atol=0)
    line = torch.linspace(math.log(low), math.log(high), num_steps, dtype=torch.float64)
    torch.testing.assert_close(log_even.log(), line, rtol=0, atol=1e-3)


def test_zero_terminal_snr_follows_fifty_digits() -> None:
    """Lin et al. 2023, algorithm 1, on Ho et al.'s betas: shift the roots, then scale them."""
    with mpmath.workdps(50):
        beta = [mpmath.mpf("1e-4") + k * mpmath.mpf("0.0199") / 999 for k in range(1000)]
        root, kept = [], mpmath.mpf(1)
        for b in beta:
            kept *= 1 - b
            root.append(mpmath.sqrt(kept))
        scale = root[0] / (root[0] - root[-1])
        reference = [1.0, *(float(((r - root[-1]) * scale) ** 2) for r in root)]
    found = schedules.zero_terminal_snr(schedules.linear(1000))
    assert found.tolist() == pytest.approx(reference, rel=1e-9, abs=0)


@given(st.lists(st.floats(1e-3, 0.9), min_size=1, max_size=40), st.booleans())
def test_given_betas_are_multiplied_out(betas: list[float], to_nothing: bool) -> None:
    """Exact products in fractions; a list and a tensor say the same."""
    betas = [*betas, 1.0] if to_nothing else betas
    left, reference = Fraction(1), [1.0]
    for beta in betas:
        left *= 1 - Fraction(beta)
        reference.append(float(left))
    found = schedules.from_betas(betas)
    assert found.tolist() == pytest.approx(reference, rel=1e-12, abs=0)
    assert schedules.from_betas(torch.tensor(betas, dtype=torch.float64)).equal(found)


def test_the_end_of_the_chain_hides_the_image() -> None:
    """L_T, the prior term, is about 1e-5 bits per dimension (Ho et al. 2020, section 4).

    The KL from N(m, s^2) to N(0, 1), averaged over an image of unit variance: torch's own formula,
    with m and s as the forward process has them.
    """
    schedule, last = NoiseSchedule(schedules.linear(1000)), torch.tensor([1000, 1000])
    x_0, none = torch.tensor([[1.0], [-1.0]]).double(), torch.zeros(2, 1).double()
    ends = torch.distributions.Normal(
        add_noise(schedule, x_0, last, none), add_noise(schedule, none, last, none + 1)
    )
    prior = torch.distributions.Normal(0.0, 1.0)
    nats = torch.distributions.kl_divergence(ends, prior).mean().item()
    assert nats / math.log(2) == pytest.approx(2.9112e-05, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0; a schedule has at least 1 step"),
        ((10, 0.0, 0.5), r"beta_start is 0; a variance lies in \(0, 1\)"),
        ((10, 0.1, 1.5), r"beta_end is 1\.5; a variance lies in \(0, 1\)"),
        ((10, 0.5, 0.1), r"beta_start is 0\.5, above beta_end, 0\.1; swap them"),
    ],
)
def test_linear_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.linear(*arguments)


def test_linear_names_the_rescaling_that_goes_too_far() -> None:
    with pytest.raises(
        ValueError, match=r"beta_end is 0\.02 and 2 after the rescaling by 1000/10;"
    ):
        schedules.linear(10, rescale=True)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0"),
        ((10, 3.0, 3.0), "start is 3 and end 3; start must lie below end"),
        ((10, -3.0, 3.0, 0.0), "tau is 0; it must be above 0"),
        ((10, -3.0, 3.0, 1.0, 1.0), r"max_beta is 1; a variance lies in \(0, 1\)"),
    ],
)
def test_sigmoid_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.sigmoid(*arguments)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0,), "num_steps is 0"),
        ((10, -0.1), r"offset is -0\.1; it must be at least 0"),
        ((10, 0.008, 1.0), r"max_beta is 1; a variance lies in \(0, 1\)"),
    ],
)
def test_cosine_says_what_is_wrong(arguments: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schedules.cosine(*arguments)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: schedules.constant(0, 0.1), "num_steps is 0"),
        (lambda: schedules.constant(10, 1.0), r"beta is 1; a variance lies in \(0, 1\)"),
        (lambda: schedules.warmup(0, 0.1, 0.2, 0.5), "num_steps is 0"),
        (lambda: schedules.warmup(10, 0.2, 0.1, 0.5), r"beta_start is 0\.2, above beta_end"),
        (lambda: schedules.warmup(10, 0.1, 0.2, 1.5), r"share is 1\.5; .* lies in \[0, 1\]"),
        (lambda: schedules.warmup(10, 0.1, 0.2, math.nan), "share is nan"),
        (lambda: schedules.one_over_t(-1), "num_steps is -1"),
        (lambda: schedules.laplace(0), "num_steps is 0"),
        (lambda: schedules.laplace(10, math.inf), "mean is inf; .* is finite"),
        (lambda: schedules.laplace(10, 0, -0.5), r"scale is -0\.5; it must be above 0"),
        (lambda: schedules.laplace(10, max_beta=1), "max_beta is 1; a variance lies in"),
        (lambda: schedules.edm(0), "num_steps is 0"),
        (lambda: schedules.edm(10, 0), "sigma_min is 0; it must be above 0"),
        (lambda: schedules.edm(10, 1, math.inf), "sigma_max is inf; .* finite"),
        (lambda: schedules.edm(10, rho=0), "rho is 0; it must be above 0"),
        (lambda: schedules.edm(10, 2, 1), "sigma_min is 2 and sigma_max 1; .* must lie below"),
        (lambda: schedules.from_betas([]), r"betas has shape \[0\]; it must be \[T\]"),
        (lambda: schedules.from_betas(torch.ones(2, 2)), r"betas has shape \[2, 2\]"),
        (lambda: schedules.from_betas([0.1, 1.0, 0.2]), r"betas\[1\] is 1; .* the last may be 1"),
        (lambda: schedules.from_betas([0.1, 1.2]), r"betas\[1\] is 1\.2; a variance lies in"),
        (lambda: schedules.from_betas([0.0, 0.1]), r"betas\[0\] is 0; a variance lies in"),
        (lambda: schedules.from_betas([0.1, math.nan]), r"betas\[1\] is nan"),
        (lambda: schedules.zero_terminal_snr(schedules.linear(1)), "alpha_bar has 1 step; .* 2"),
        (lambda: schedules.zero_terminal_snr(torch.ones(3).double()), r"alpha_bar\[1\] is 1 after"),
    ],
)
def test_each_kind_says_what_is_wrong(make: Callable[[], Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
