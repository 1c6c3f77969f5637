"""Inpainting against posteriors in closed form, and against laws that hold to rounding.

With linear denoisers a batch whose row i holds only source of noise i shows the exact variance at
each step, as in test_samplers.py. Statistical bounds are at a fixed seed.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.choices import Prediction
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, add_noise, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.guidance import classifier_free
from ddpm_ray.diffusion.inpainting import (
    jump_schedule,
    known_error,
    on_canvas,
    paste,
    repaint,
    replacement,
    sdedit,
    seam,
    windowed,
)
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from tests.diffusion.test_parameterization import KINDS
from tests.truth import ONE, SCHEDULE, THREE, mixture, standard

SHORT = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
falling = st.sets(st.integers(1, 40), min_size=1).map(lambda t: (*sorted(t, reverse=True), 0))
HALF = (torch.arange(16).view(1, 1, 4, 4) % 4 < 2).double()  # the left half is known


def noise_at(n: int) -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def shrinking(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x_t + t.view(-1, 1, 1, 1) / 40)


def test_jump_schedules_by_hand() -> None:
    assert jump_schedule((9, 8, 5, 3, 1, 0), 1, 1) == (9, 8, 5, 3, 1, 0)
    assert jump_schedule((3, 2, 1, 0), 1, 2) == (3, 2, 3, 2, 1, 2, 1, 0)
    assert jump_schedule((9, 8, 5, 3, 1, 0), 2, 2) == (9, 8, 5, 9, 8, 5, 3, 1, 5, 3, 1, 0)
    assert jump_schedule((9, 8, 0), 2, 5) == (9, 8, 0)  # no room


def test_the_jump_schedule_of_the_paper_is_as_long_as_theirs() -> None:
    """T = 250, j = 10, r = 10 takes 4570 transitions where a jump is ten single steps."""
    way = jump_schedule(uniform_steps(250, 250), 10, 10)
    assert sum(abs(t - s) for t, s in pairwise(way)) == 4570
    assert sum(s > t for t, s in pairwise(way)) == 24 * 9


@given(falling, st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.booleans())
def test_repaint_keeps_the_marginals_on_its_way_up_and_down(
    steps: tuple[int, ...], jump_length: int, resamples: int, eta: float, all_known: bool
) -> None:
    """Data that is the image 0, known or denoised, has variance 1 - alpha_bar at every visit."""
    way = jump_schedule(steps, jump_length, resamples)
    x_T = torch.zeros(len(way), 1, dtype=torch.float64)
    x_T[0] = (1 - SHORT.alpha_bar[steps[0]]).sqrt()
    asked, visits = [], []

    def noise(n: int) -> Tensor:
        asked.append(n)
        impulse = torch.zeros_like(x_T)
        impulse[n + 1] = 1
        return impulse

    def optimum(x_t: Tensor, t: Tensor) -> Tensor:
        visits.append((int(t[0]), float(x_t.square().sum())))
        return x_t / (1 - SHORT.at(t, x_t)).sqrt()

    end = repaint(
        X0Estimator(SHORT, optimum),
        x_T,
        jump_schedule(steps, jump_length, resamples),
        known=torch.zeros_like(x_T),
        mask=torch.full((1, 1), all_known),
        noise=noise,
        eta=eta,
    )
    assert [t for t, _ in visits] == [t for t, s in pairwise(way) if s < t]
    assert [v for _, v in visits] == pytest.approx(
        [float(1 - SHORT.alpha_bar[t]) for t, _ in visits]
    )
    assert asked == list(range(len(way) - 2))
    assert end.abs().max() < 1e-12


@given(falling, st.floats(0, 1))
def test_repaint_of_nothing_known_without_jumps_is_ddim(steps: tuple[int, ...], eta: float) -> None:
    free = repaint(
        X0Estimator(SHORT, shrinking),
        noise_at(99),
        jump_schedule(steps, resamples=1),
        known=noise_at(98),
        mask=0 * HALF,
        noise=noise_at,
        eta=eta,
    )
    other = ddim(
        X0Estimator(SHORT, shrinking),
        noise_at(99),
        steps,
        eta=eta,
        noise=lambda t: noise_at(steps.index(t)),
    )
    torch.testing.assert_close(free, other, rtol=1e-9, atol=1e-9)


def test_known_pixels_come_back_to_the_bit_and_the_others_are_no_ones_but_the_samplers() -> None:
    known = 3 * noise_at(98).float()  # beyond the clip
    end = repaint(
        X0Estimator(SHORT, shrinking),
        noise_at(99).float(),
        jump_schedule((40, 30, 20, 10, 0), 2, 3),
        known=known,
        mask=HALF,
        noise=lambda n: noise_at(n).float(),
    )
    assert end.dtype == torch.float32
    assert known_error(end, known, HALF) == 0
    assert known_error(end, known, 1 - HALF) > 1
    assert end[..., 2:].abs().max() <= 1
    result = noise_at(97).float()
    pasted = paste(result, known, HALF)
    assert torch.equal(pasted[..., :2], known[..., :2])
    assert torch.equal(pasted[..., 2:], result[..., 2:])


def test_a_painted_image_is_a_function_of_seed_and_index() -> None:
    def painted(index: list[int]) -> Tensor:
        i = torch.tensor(index)
        x_T = counter_rng.normal(1, counter_rng.Purpose.SAMPLE_START, 0, i, (2, 4, 4))
        return repaint(
            X0Estimator(SHORT, shrinking),
            x_T,
            jump_schedule((40, 30, 20, 10, 0), 1),
            known=0 * x_T,
            mask=HALF,
            noise=lambda n: counter_rng.normal(1, counter_rng.Purpose.SAMPLE_STEP, n, i, (2, 4, 4)),
        )

    torch.testing.assert_close(painted([5, 7, 8])[2:], painted([8]))


# Two correlated coordinates: a diagonal Gaussian turned by 45 degrees, of which x_2 is known.
TURN = torch.tensor([[1, -1], [1, 1]], dtype=torch.float64) / math.sqrt(2)
UPRIGHT = mixture([1.0], [[0.3, 0.1]], [[1.0, 0.2]])


def turned(x_t: Tensor, t: Tensor) -> Tensor:
    return UPRIGHT.expected_noise(x_t @ TURN, t) @ TURN.T


def painted(
    denoise: Denoise, value: float, count: int, transitions: int, resamples: int | None
) -> Tensor:
    """The first coordinate [count], where the second is `value`; None: by replacement."""
    generator, steps = torch.Generator().manual_seed(0), uniform_steps(1000, transitions)
    x_T = standard(count, generator, THREE)
    known, mask = torch.full_like(x_T, value), torch.tensor([[0, 1]])

    def noise(n: int) -> Tensor:
        return standard(count, generator, THREE)

    if resamples is None:
        replaced = replacement(denoise, Parameterization.of("epsilon", SCHEDULE), known, mask)
        end = ancestral(
            X0Estimator(SCHEDULE, replaced, clip=None),
            x_T,
            steps,
            noise=noise,
            variance="fixed_small",
        )
        assert known_error(end, known, mask) < 1e-9
    else:
        end = repaint(
            X0Estimator(SCHEDULE, denoise, clip=None),
            x_T,
            jump_schedule(steps, 1, resamples),
            known=known,
            mask=mask,
            noise=noise,
        )
        assert known_error(end, known, mask) == 0
    return end[:, 0]


def test_repaint_approaches_a_gaussian_posterior_and_replacement_does_not() -> None:
    """The regression of one coordinate on the other; measured: 0.19, 0.03, 0.01 off the mean."""
    mean, covariance = TURN @ UPRIGHT.mean[0], TURN @ UPRIGHT.variance[0].diag() @ TURN.T
    slope = covariance[0, 1] / covariance[1, 1]
    truth = float(mean[0] + slope * (1 - mean[1]))
    spread = float((covariance[0, 0] - slope * covariance[0, 1]).sqrt())
    cheap, some, many = (painted(turned, 1.0, 4000, 100, r) for r in (None, 5, 20))
    assert abs(many.mean() - truth) < 0.02 < abs(some.mean() - truth) < 0.06
    assert truth - cheap.mean() > 0.15
    assert abs(many.std() - spread) < 0.05 < 0.1 < cheap.std() - spread


def test_repaint_finds_the_component_that_the_known_part_settles() -> None:
    """x_2 = 1.5 comes from component 1 alone (1 - 3e-12), which is 30 in 100 without it."""
    shares = []
    for resamples in (None, 1, 5, 20):
        x = painted(THREE.expected_noise, 1.5, 2000, 50, resamples)
        shares.append(float(((x - 1).abs() < 5 * 0.3).double().mean()))
    cheap, once, some, many = shares
    assert 0.55 < cheap < once + 0.05 < some - 0.1 < many - 0.2
    assert many > 0.95


def test_shares_of_components_that_stay_open_are_not_the_posteriors() -> None:
    """A limit of the method: the known part reaches the choice through noise of its own.

    By Bayes, 0.575 of x_2 = 0.5 comes from component 0; with 20 resamples 0.72 is drawn.
    """
    z = (0.5 - THREE.mean[:, 1]) / THREE.variance[:, 1].sqrt()
    weight = THREE.weight * (-z.square() / 2).exp() / THREE.variance[:, 1].sqrt()
    truth = float(weight[0] / weight.sum())
    drawn = float((painted(THREE.expected_noise, 0.5, 2000, 50, 20) < -0.5).double().mean())
    assert truth == pytest.approx(0.575, abs=1e-3)
    assert 0.1 < drawn - truth < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_replacement_takes_the_known_pixels_along_their_own_noise(kind: Prediction) -> None:
    """Under DDIM at eta = 0 that of x_T, at every step (Song et al. 2021, arXiv:2010.02502)."""
    parameterization, known, t = (
        Parameterization.of(kind, SHORT),
        noise_at(98),
        torch.full((3,), 40),
    )
    seen = []
    end = ddim(
        X0Estimator(
            SHORT,
            replacement(shrinking, parameterization, known, HALF),
            parameterization,
            clip=None,
        ),
        add_noise(SHORT, known, t, noise_at(99)),
        (40, 30, 7, 0),
        on_step=lambda t, x_t, x_0: seen.append((t, x_t.clone(), x_0.clone())),
    )
    for step, x_t, x_0 in seen:
        at_t = add_noise(SHORT, known, torch.full((3,), step), noise_at(99))
        torch.testing.assert_close(x_t[..., :2], at_t[..., :2])
        free = parameterization.x_0(
            x_t, torch.full((3,), step), shrinking(x_t, torch.full((3,), step))
        )
        torch.testing.assert_close(x_0[..., 2:], free[..., 2:])
    assert known_error(end, known, HALF) < 1e-9


def test_a_learned_variance_passes_and_is_not_read() -> None:
    def wide(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([shrinking(x_t, t), 0.3 * x_t], 1)

    x, t, known = noise_at(1), torch.full((3,), 20), noise_at(98)
    parameterization = Parameterization.of("epsilon", SHORT)
    model_output = replacement(wide, parameterization, known, HALF)(x, t)
    assert torch.equal(
        model_output[:, :2], replacement(shrinking, parameterization, known, HALF)(x, t)
    )
    assert torch.equal(model_output[:, 2:], 0.3 * x)

    def end(denoise: Denoise) -> Tensor:
        return repaint(
            X0Estimator(SHORT, denoise),
            x,
            jump_schedule((40, 20, 0)),
            known=known,
            mask=HALF,
            noise=noise_at,
        )

    assert torch.equal(end(wide), end(shrinking))


def test_an_image_lies_on_its_canvas_where_it_was_put() -> None:
    image = noise_at(1).float()
    known, mask = on_canvas(image, 6, 9, 2, 4)
    assert (known.shape, mask.shape, known.dtype) == ((3, 2, 6, 9), (1, 1, 6, 9), torch.float32)
    assert torch.equal(known[:, :, 2:6, 4:8], image)
    assert mask.sum() == 16
    assert mask[0, 0, 2:6, 4:8].all()
    assert (known * ~mask).abs().sum() == 0


@given(st.integers(3, 9), st.integers(2, 9), st.integers(0, 2), st.integers(0, 1))
def test_a_canvas_pixel_gets_the_mean_of_the_windows_that_show_it(
    height: int, width: int, down: int, across: int
) -> None:
    """Pixel by pixel, from the answers as they were given (Bar-Tal et al. 2023, eq. 5)."""
    calls = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        model_output = x_t.mean((1, 2, 3), keepdim=True) + 0.1 * torch.cat([x_t, x_t**2], 1)
        calls.append((x_t, t, model_output))
        return model_output

    x = torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(1)).double()
    place = torch.arange(height * width).view(height, width)
    x[1] = place  # tells which window a row is
    whole = windowed(denoise, (3, 2), (down, across))(x, torch.tensor([7, 4]))
    ((windows, t, answers),) = calls
    assert t.tolist() == [7, 4] * (len(windows) // 2)
    got: dict[int, list[Tensor]] = {}
    for k in range(0, len(windows), 2):
        for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
            got.setdefault(int(windows[k + 1, 0, i, j]), []).append(answers[k : k + 2, :, i, j])
    expected = torch.stack([torch.stack(got[p]).mean(0) for p in range(height * width)], -1)
    torch.testing.assert_close(whole, expected.view(2, 2, height, width))
    first_rows = sorted({int(w[0, 0, 0]) // width for w in windows[1::2]})
    first_columns = sorted({int(w[0, 0, 0]) % width for w in windows[1::2]})
    assert all(later - first <= 3 - down for first, later in pairwise(first_rows))
    assert all(later - first <= 2 - across for first, later in pairwise(first_columns))


def test_windows_of_a_local_network_are_the_canvas_and_take_labels_once_each() -> None:
    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.labels is not None
        return shrinking(x_t, t + conditioning.labels % 6)

    x, t, labels = noise_at(3), torch.tensor([3, 9, 20]), torch.tensor([0, 2, 1])
    conditioning = Conditioning(labels)
    whole = classifier_free(network, conditioning, 2.0)(x, t)
    cut = windowed(classifier_free(network, conditioning.repeat(4), 2.0), (3, 3), (1, 1))(x, t)
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("strength, t_0", [(1.0, 1000), (0.5, 500), (0.29, 290), (0.295, 290)])
def test_sdedit_follows_the_flow_from_where_it_starts(strength: float, t_0: int) -> None:
    """For one Gaussian the flow keeps (x - mean) / deviation, from any step on."""
    image = torch.tensor([[0.9], [0.2]], dtype=torch.float64)
    noise = torch.tensor([[0.3], [-1.1]], dtype=torch.float64)
    start, steps = sdedit(SCHEDULE, image, uniform_steps(1000, 100), strength, noise)
    assert (steps[0], steps[-1], len(steps)) == (t_0, 0, t_0 // 10 + 1)
    a = SCHEDULE.alpha_bar[t_0]
    torch.testing.assert_close(start, a.sqrt() * image + (1 - a).sqrt() * noise)
    kept = (start - a.sqrt() * ONE.mean) / (a * ONE.variance + 1 - a).sqrt()
    end = ddim(X0Estimator(SCHEDULE, ONE.expected_noise, clip=None), start, steps)
    truth = ONE.mean + ONE.variance.sqrt() * kept
    torch.testing.assert_close(end, truth, rtol=0, atol=0.03)


def test_sdedit_starts_at_the_step_that_was_meant() -> None:
    """0.29 * 100 is 28.999999999999996."""
    schedule = NoiseSchedule(schedules.linear(100))
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert sdedit(schedule, x, uniform_steps(100, 100), 0.29, x)[1][0] == 29


def test_a_seam_by_hand() -> None:
    """Steps at the edge: 2 and 2. Others along the rows: 1 0, 1 1; down the columns: 0 0 0 1."""
    image = torch.tensor([[[[0.0, 1, 3, 3], [0, 1, 3, 4]]]])
    mask = torch.tensor([[[[1.0, 1, 0, 0], [1, 1, 0, 0]]]])
    assert seam(image, mask).tolist() == [2 / (4 / 8)]
    assert seam(image, torch.ones_like(mask)).isnan().all()


def test_noise_has_no_seam_and_a_brighter_half_has() -> None:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :20] = 1
    mask[..., :30, :] = 1
    flat = seam(image, mask)
    assert (flat - 1).abs().max() < 4 * 0.76 / math.sqrt(3 * (34 + 44))  # |N| varies by 0.76 of it
    assert (seam(image + 5 * mask, mask) > 3).all()
    assert torch.equal(seam(image[1:], mask), flat[1:])


X_T = torch.zeros(3, 2, 4, 4)


@pytest.mark.parametrize(
    "act, complaint",
    [
        (
            lambda: jump_schedule((3, 0), 0, 2),
            "jump_length is 0 and resamples 2; both are at least 1",
        ),
        (
            lambda: jump_schedule((3, 0), 1, 0),
            "jump_length is 1 and resamples 0; both are at least 1",
        ),
        (lambda: paste(X_T, X_T, X_T + 0.5), "mask has other values than 0 and 1"),
        (
            lambda: repaint(
                X0Estimator(SHORT, shrinking),
                X_T,
                jump_schedule((9, 0)),
                known=X_T,
                mask=HALF,
                noise=noise_at,
                eta=2,
            ),
            "eta is 2; it lies between 0",
        ),
        (
            lambda: jump_schedule((9, 1)),
            "steps are 9, 1; they must fall",
        ),
        (
            lambda: repaint(
                X0Estimator(SHORT, shrinking),
                X_T,
                jump_schedule((41, 0)),
                known=X_T,
                mask=HALF,
                noise=noise_at,
            ),
            "steps start at 41, but the schedule has T = 40 steps",
        ),
        (
            lambda: repaint(
                X0Estimator(SHORT, shrinking), X_T, (9, 1), known=X_T, mask=HALF, noise=noise_at
            ),
            "steps are 9, 1; they must fall",
        ),
        (lambda: jump_schedule((9, 20, 0)), "steps go from 9 to 20; they must fall strictly"),
        (lambda: on_canvas(X_T, 6, 6, 3, 0), r"4 x 4 at \(3, 0\) is not within 6 x 6; enlarge"),
        (lambda: on_canvas(X_T, 6, 6, 0, -1), r"4 x 4 at \(0, -1\) is not within 6 x 6; enlarge"),
        (
            lambda: windowed(shrinking, (4, 4), (0, 4)),
            r"overlap is \(0, 4\) for windows of \(4, 4\); it lies from 0",
        ),
        (
            lambda: windowed(shrinking, (4, 5), (2, 2))(X_T, torch.tensor([1, 1, 1])),
            "canvas is 4 long and a window 5; take smaller windows",
        ),
        (
            lambda: sdedit(SHORT, X_T, (40, 20, 0), 0.4, X_T),
            r"strength is 0\.4; .* raise it or take more",
        ),
        (
            lambda: sdedit(SHORT, X_T, (40, 20, 0), 1.5, X_T),
            r"strength is 1\.5; it lies in \(0, 1\]",
        ),
    ],
)
def test_inpainting_refuses(act: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        act()
