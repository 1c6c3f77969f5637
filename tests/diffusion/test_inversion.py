"""DDIM backwards against DDIM forwards and the closed flow of one Gaussian; noises in between."""

import math
from functools import partial
from itertools import pairwise

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.choices import Prediction
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, add_noise
from ddpm_ray.diffusion.inversion import ddim_inversion, interpolate
from ddpm_ray.diffusion.samplers import ddim
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from tests.truth import ONE, SCHEDULE, THREE

NO_SIGNAL = NoiseSchedule(torch.cat([SCHEDULE.alpha_bar[:-1], torch.zeros(1, dtype=torch.float64)]))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rough(x_t: Tensor, t: Tensor) -> Tensor:
    """A network like no optimum."""
    return torch.tanh(x_t + t.view(-1, 1) / 1000)


@pytest.mark.parametrize(
    "schedule, kind",
    [(SCHEDULE, "epsilon"), (SCHEDULE, "x_0"), (SCHEDULE, "v"), (NO_SIGNAL, "v")],
)
@pytest.mark.parametrize("steps", [uniform_steps(1000, 20), (1000, 900, 150, 149, 20, 0)])
def test_ddim_gives_back_the_inverted_image(
    schedule: NoiseSchedule, kind: Prediction, steps: tuple[int, ...]
) -> None:
    """To rounding, whatever the network says and the steps: here the optimum for one Gaussian."""
    parameterization = Parameterization.of(kind, schedule)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return parameterization.output_from_x0(x_t, t, ONE.expected_image(x_t, t, schedule))

    x_0 = ONE.sample(50, torch.Generator().manual_seed(0))
    x_T = ddim_inversion(
        X0Estimator(schedule, denoise, parameterization, clip=None), x_0, steps, iterations=60
    )
    again = ddim(X0Estimator(schedule, denoise, parameterization, clip=None), x_T, steps)
    torch.testing.assert_close(again, x_0, rtol=1e-10, atol=1e-10)
    once = ddim_inversion(X0Estimator(schedule, denoise, parameterization, clip=None), x_0, steps)
    off = ddim(X0Estimator(schedule, denoise, parameterization, clip=None), once, steps) - x_0
    assert off.abs().max() > 0.01


def test_images_of_a_mixture_come_back_and_their_noise_is_standard_normal() -> None:
    """Each axis of x_T by a Kolmogorov-Smirnov test: the flow takes the data's law to N(0, 1)."""
    x_0, steps = THREE.sample(5000, torch.Generator().manual_seed(1)), uniform_steps(1000, 100)
    x_T = ddim_inversion(
        X0Estimator(SCHEDULE, THREE.expected_noise, clip=None), x_0, steps, iterations=12
    )
    again = ddim(X0Estimator(SCHEDULE, THREE.expected_noise, clip=None), x_T, steps)
    torch.testing.assert_close(again, x_0, rtol=1e-6, atol=1e-6)
    for axis in range(2):
        assert scipy.stats.kstest(x_T[:, axis].numpy(), "norm").pvalue > 1e-3


def test_a_single_iteration_follows_the_flow_with_order_one() -> None:
    """For one Gaussian the flow keeps (x - mean) / deviation: x_T is known in closed form."""
    x_0 = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    a = SCHEDULE.alpha_bar[-1]
    kept = (x_0 - ONE.mean) / ONE.variance.sqrt()
    truth = a.sqrt() * ONE.mean + (a * ONE.variance + 1 - a).sqrt() * kept
    errors = []
    for count in (64, 128, 256):
        end = ddim_inversion(
            X0Estimator(SCHEDULE, ONE.expected_noise, clip=None), x_0, uniform_steps(1000, count)
        )
        errors.append(float((end - truth).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize("t", [1, 300, 700])
def test_a_single_iteration_adds_the_noise_that_the_network_sees_in_the_image(t: int) -> None:
    """From the image itself: x_t of eq. 4 of Ho et al. 2020, the noise predicted and not drawn."""
    x_0, steps = drawn(0, 4, 3), torch.full((4,), t)
    x_t = ddim_inversion(X0Estimator(SCHEDULE, rough, clip=None), x_0, (t, 0))
    torch.testing.assert_close(x_t, add_noise(SCHEDULE, x_0, steps, rough(x_0, steps)))


def test_inversion_calls_the_network_at_the_noisier_end() -> None:
    calls: list[int] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return ONE.expected_noise(x_t, t)

    x_0 = drawn(0, 4, 1).float().requires_grad_()
    x_T = ddim_inversion(
        X0Estimator(SCHEDULE, denoise, clip=None), x_0, (1000, 300, 0), iterations=2
    )
    assert calls == [300, 300, 1000, 1000]
    assert torch.equal(x_0, drawn(0, 4, 1).float())
    assert x_T.dtype == torch.float32
    x_T += 1  # an inference tensor would refuse


@pytest.mark.parametrize(
    "steps, iterations, complaint",
    [
        ((500, 600, 0), 1, "steps go from 500 to 600; they must fall strictly"),
        ((1000, 0), 0, "iterations is 0; take at least 1 a step"),
        ((1000, 0), 1, "steps are 1000, 0 and alpha_bar is 0 at 1000: .* take more steps"),
    ],
)
def test_inversion_refuses_what_it_cannot_undo(
    steps: tuple[int, ...], iterations: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ddim_inversion(
            X0Estimator(
                NO_SIGNAL, ONE.expected_noise, Parameterization.of("v", NO_SIGNAL), clip=None
            ),
            drawn(0, 1, 1),
            steps,
            iterations=iterations,
        )


@given(st.floats(0, 1), st.floats(0.1, math.pi - 0.1), st.integers(0, 9))
def test_the_way_is_an_even_walk_on_the_sphere(share: float, angle: float, seed: int) -> None:
    """In the plane of two noises of one length: the point at share times their angle."""
    basis = torch.linalg.qr(drawn(seed, 12, 2)).Q.T.reshape(2, 1, 3, 2, 2)
    on_arc = partial(on_circle, basis)
    between = interpolate(on_arc(0), on_arc(angle), share)
    torch.testing.assert_close(between, on_arc(share * angle), rtol=1e-9, atol=1e-9)


def on_circle(basis: Tensor, angle: float) -> Tensor:
    return 3 * (math.cos(angle) * basis[0] + math.sin(angle) * basis[1])


def test_each_image_of_a_batch_has_its_own_way() -> None:
    x_a = drawn(1, 3, 5)
    x_b = torch.stack([x_a[0] + 0.1, 5 * drawn(2, 5), -2 * x_a[2] + 0.3])
    together = interpolate(x_a, x_b, 0.3)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], interpolate(x_a[i, None], x_b[i, None], 0.3)
        )


@given(st.floats(0, 1))
def test_noises_in_between_are_standard_normal(share: float) -> None:
    """16 pairs of 3 x 32 x 32, each its own angle: the second moment within 5 standard errors."""
    between = interpolate(drawn(1, 16, 3, 32, 32), drawn(2, 16, 3, 32, 32), share)
    count = between.numel()
    assert abs(float(between.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(between.mean())) < 5 / math.sqrt(count)
    assert scipy.stats.kstest(between.flatten().numpy(), "norm").pvalue > 1e-3
    assert (between.square().mean((1, 2, 3)) - 1).abs().max() < 5 * math.sqrt(2 / 3072)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    x_a, x_b = drawn(1, 4, 5).to(dtype), drawn(2, 4, 5).to(dtype)
    assert torch.equal(interpolate(x_a, x_b, 0), x_a)
    assert torch.equal(interpolate(x_a, x_b, 1), x_b)
    assert interpolate(x_a, x_b, 0.5).dtype == dtype


@pytest.mark.parametrize("nearness", [0, 1e-12, 1e-7, 1e-5])
def test_close_noises_have_close_noises_in_between(nearness: float) -> None:
    """Almost the same, equal, opposite, and nothing at all: no division by the sine of no angle."""
    x = drawn(1, 4, 5)
    near = x + nearness * drawn(2, 4, 5)
    torch.testing.assert_close(interpolate(x, near, 0.25), 0.75 * x + 0.25 * near)
    torch.testing.assert_close(interpolate(x, -x, 0.25), 0.5 * x)
    assert torch.equal(interpolate(0 * x, 0 * x, 0.5), 0 * x)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_beyond_the_ends_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share is (-0\.1|1\.5|nan); it lies between 0 \(x_a\)"):
        interpolate(drawn(1, 2, 3), drawn(2, 2, 3), share)


def test_noises_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x_a is \[2, 3\] and x_b \[2, 4\]; they must agree"):
        interpolate(drawn(1, 2, 3), drawn(2, 2, 4), 0.5)
