"""Fast samplers: their order of convergence, and samples from a known law; see tests/truth.py."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.choices import Prediction
from ddpm_ray.diffusion import NoiseSchedule, Parameterization
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.solvers import _weights, dpm_solver_pp, heun, plms, unipc
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from tests.diffusion.test_against_truth import assert_drawn_from_the_mixture
from tests.truth import ONE, SCHEDULE, THREE, Mixture, standard

NO_SIGNAL = NoiseSchedule(torch.cat([SCHEDULE.alpha_bar[:-1], torch.zeros(1, dtype=torch.float64)]))
falling = st.sets(st.integers(1, 1000), min_size=1, max_size=12).map(
    lambda t: (*sorted(t, reverse=True), 0)
)
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
    "unipc_3": partial(unipc, order=3),
    "heun": heun,
    "plms": plms,
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def even_in_log_snr(count: int) -> tuple[int, ...]:
    """Steps of SCHEDULE from 990 to 1 and 0, the log-SNR of which rises evenly."""
    log_snr = SCHEDULE.log_snr(torch.arange(1001))
    wanted = torch.linspace(float(log_snr[990]), float(log_snr[1]), count, dtype=torch.float64)
    nearest = (log_snr[1:991, None] - wanted).abs().argmin(0) + 1
    return (*sorted(set(nearest.tolist()), reverse=True), 0)


def flow(schedule: NoiseSchedule, x: Tensor) -> Tensor:
    """Where the probability flow of ONE takes x at T: it keeps (x - mean) / deviation."""
    a = schedule.alpha_bar[-1]
    kept = (x - a.sqrt() * ONE.mean) / (a * ONE.variance + 1 - a).sqrt()
    return ONE.mean + ONE.variance.sqrt() * kept


def answering(
    truth: Mixture, parameterization: Parameterization
) -> Callable[[Tensor, Tensor], Tensor]:
    """The optimal denoiser of a mixture, in the words of `parameterization`."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return parameterization.output_from_x0(
            x_t, t, truth.expected_image(x_t, t, parameterization.schedule)
        )

    return denoise


def rough(x_t: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is not linear and looks at t; its estimates of x_0 leave [-1, 1]."""
    return torch.tanh(x_t + t.view(-1, 1) / 1000)


def noise_at(t: int) -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize(
    "solver, order",
    [
        (partial(dpm_solver_pp, order=1), 1),
        (dpm_solver_pp, 2),
        (partial(unipc, order=1), 2),
        (unipc, 3),
        (heun, 2),
        (plms, 2),
    ],
)
def test_each_solver_converges_to_the_flow_with_its_order(
    solver: Callable[..., Tensor], order: int
) -> None:
    """UniPC corrects to one more than its predictor's order (Zhao et al. 2023, section 3).

    The last transition, of order 1 for most, starts where the log-SNR is 18: it adds 1e-8.
    """
    half_log_snr = torch.linspace(9, -4, 1025, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    schedule = NoiseSchedule(torch.cat([one, torch.sigmoid(2 * half_log_snr)]))
    x_T = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)
    denoise = partial(ONE.expected_noise, schedule=schedule)
    errors = []
    for count in (64, 128, 256):
        steps = (*(t + 1 for t in uniform_steps(1024, count)), 0)
        end = solver(X0Estimator(schedule, denoise, clip=None), x_T, steps)
        errors.append(float((end - flow(schedule, x_T)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.15)


def test_more_order_is_less_error() -> None:
    """In 20 network calls on an ordinary schedule, against the flow's closed form."""
    x_T, steps = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64), even_in_log_snr(20)
    a = SCHEDULE.alpha_bar[: steps[0] + 1]
    error = {
        name: float(
            (
                solver(X0Estimator(SCHEDULE, ONE.expected_noise, clip=None), x_T, steps)
                - flow(NoiseSchedule(a), x_T)
            )
            .abs()
            .max()
        )
        for name, solver in (SOLVERS | {"ddim": ddim}).items()
    }
    assert error["dpm_solver_pp"] < error["ddim"] / 4
    assert error["plms"] < error["ddim"] / 4
    assert error["unipc"] < error["dpm_solver_pp"]
    assert error["unipc_3"] < error["unipc"] / 4


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_plms_integrates_a_polynomial_noise_exactly(degree: int) -> None:
    """Where sqrt((1 - a) / a) = t / 50, the flow of x / sqrt(a) is the integral of the noise.

    Transition i knows i + 1 values, enough for t^i; the integral of t^degree is by hand.
    """
    schedule = NoiseSchedule(1 / (1 + (torch.arange(101, dtype=torch.float64) / 50) ** 2))
    seen: list[float] = []

    def note(t: int, x_t: Tensor, x_0: Tensor) -> None:
        seen.append(float(x_t / schedule.alpha_bar[t].sqrt()))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return (t.double()[:, None] / 50) ** degree

    steps, x_T = uniform_steps(100, 10), torch.ones(1, 1, dtype=torch.float64)
    end = plms(X0Estimator(schedule, denoise, clip=None), x_T, steps, on_step=note)
    moved = [after - before for before, after in pairwise([*seen, float(end)])]
    integral = [
        ((s / 50) ** (degree + 1) - (t / 50) ** (degree + 1)) / (degree + 1)
        for t, s in pairwise(steps)
    ]
    assert moved[degree:] == pytest.approx(integral[degree:], abs=1e-12)
    assert all(abs(m - i) > 1e-3 for m, i in zip(moved[:degree], integral, strict=False))


@given(falling)
def test_dpm_solver_pp_of_order_1_is_ddim(steps: tuple[int, ...]) -> None:
    one = dpm_solver_pp(X0Estimator(SCHEDULE, rough), noise_at(0), steps, order=1)
    other = ddim(X0Estimator(SCHEDULE, rough), noise_at(0), steps)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(falling)
def test_its_sde_of_order_1_is_ancestral_sampling(steps: tuple[int, ...]) -> None:
    one = dpm_solver_pp(X0Estimator(SCHEDULE, rough), noise_at(0), steps, order=1, noise=noise_at)
    other = ancestral(
        X0Estimator(SCHEDULE, rough), noise_at(0), steps, noise=noise_at, variance="fixed_small"
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [dpm_solver_pp, unipc])
def test_the_first_step_from_no_signal_is_ddims(solver: Callable[..., Tensor]) -> None:
    """So is the second of DPM-Solver++, as what lies at log-SNR minus infinity says no slope."""
    parameterization = Parameterization.of("v", NO_SIGNAL)
    seen: list[list[Tensor]] = []
    for way in (ddim, solver):
        seen.append([])
        way(
            X0Estimator(NO_SIGNAL, rough, parameterization),
            noise_at(0),
            (1000, 800, 500, 0),
            on_step=lambda t, x_t, x_0: seen[-1].append(x_t.clone()),
        )
    same = 3 if solver is dpm_solver_pp else 2
    torch.testing.assert_close(seen[1][:same], seen[0][:same], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "solver, steps",
    [
        (dpm_solver_pp, uniform_steps(1000, 40)),
        (unipc, uniform_steps(1000, 20)),
        (partial(unipc, order=3), uniform_steps(1000, 20)),
        (plms, uniform_steps(1000, 30)),
        (heun, even_in_log_snr(30)),
    ],
)
def test_each_solver_draws_from_the_data(
    solver: Callable[..., Tensor], steps: tuple[int, ...]
) -> None:
    """In few tens of steps, of which DDIM needs 60 to pass."""
    x_T = standard(10_000, torch.Generator().manual_seed(3), THREE)
    assert_drawn_from_the_mixture(
        solver(X0Estimator(SCHEDULE, THREE.expected_noise, clip=None), x_T, steps)
    )


def test_the_sde_draws_from_the_data() -> None:
    generator = torch.Generator().manual_seed(3)
    samples = dpm_solver_pp(
        X0Estimator(SCHEDULE, THREE.expected_noise, clip=None),
        standard(10_000, generator, THREE),
        uniform_steps(1000, 50),
        noise=lambda t: standard(10_000, generator, THREE),
    )
    assert_drawn_from_the_mixture(samples)


@pytest.mark.parametrize("solver", [dpm_solver_pp, unipc, partial(unipc, order=3)])
def test_a_schedule_that_ends_in_no_signal_is_no_special_case(
    solver: Callable[..., Tensor],
) -> None:
    x_T = standard(10_000, torch.Generator().manual_seed(5), THREE)
    parameterization = Parameterization.of("v", NO_SIGNAL)
    samples = solver(
        X0Estimator(NO_SIGNAL, answering(THREE, parameterization), parameterization, clip=None),
        x_T,
        uniform_steps(1000, 40),
    )
    assert_drawn_from_the_mixture(samples)


@each_solver
def test_every_kind_of_prediction_gives_the_same_images(solver: Callable[..., Tensor]) -> None:
    x_T = standard(100, torch.Generator().manual_seed(4), THREE)
    images = []
    for kind in get_args(Prediction):
        parameterization = Parameterization.of(kind, SCHEDULE)
        images.append(
            solver(
                X0Estimator(SCHEDULE, answering(THREE, parameterization), parameterization),
                x_T,
                (990, 600, 300, 100, 30, 0),
            )
        )
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, called",
    [
        ("dpm_solver_pp", [1000, 700, 200]),
        ("unipc", [1000, 700, 200]),
        ("plms", [1000, 700, 200]),
        ("heun", [1000, 700, 700, 200, 200]),
    ],
)
def test_network_calls_are_as_few_as_promised(name: str, called: list[int]) -> None:
    """And `on_step` sees each step once, with the clipped estimate of x_0."""
    calls: list[int] = []
    seen: list[tuple[int, Tensor]] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return rough(x_t, t)

    end = SOLVERS[name](
        X0Estimator(SCHEDULE, denoise),
        3 * noise_at(0),
        (1000, 700, 200, 0),
        on_step=lambda t, x_t, x_0: seen.append((t, x_0.clone())),
    )
    assert calls == called
    assert [t for t, _ in seen] == [1000, 700, 200]
    assert all(x_0.abs().max() == 1 for _, x_0 in seen), "nothing was clipped"
    if name != "plms":
        assert torch.equal(end, seen[-1][1])


@each_solver
def test_what_goes_in_is_kept_and_what_comes_out_is_an_ordinary_tensor(
    solver: Callable[..., Tensor],
) -> None:
    x_T = noise_at(0).float().requires_grad_()
    end = solver(X0Estimator(SCHEDULE, rough), x_T, (990, 500, 100, 10, 0))
    assert torch.equal(x_T, noise_at(0).float())
    assert end.dtype == torch.float32
    assert not end.requires_grad
    end += 1  # an inference tensor would refuse


@pytest.mark.parametrize(
    "solver, choice, complaint",
    [
        (dpm_solver_pp, {"order": 3}, r"order is 3; DPM-Solver\+\+ is of order 1 to 2 here"),
        (dpm_solver_pp, {"order": 0}, r"order is 0; DPM-Solver\+\+ is of order 1 to 2 here"),
        (unipc, {"order": 4}, "order is 4; UniPC is of order 1 to 3 here"),
    ],
)
def test_other_orders_are_refused(
    solver: Callable[..., Tensor], choice: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        solver(X0Estimator(SCHEDULE, rough), noise_at(0), (1000, 0), **choice)


@each_solver
def test_steps_that_do_not_fall_to_0_are_refused(solver: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="steps go from 10 to 20; they must fall strictly"):
        solver(X0Estimator(SCHEDULE, rough), noise_at(0), (40, 10, 20, 0))


@pytest.mark.parametrize("solver", [heun, plms])
def test_methods_in_noise_refuse_to_start_without_signal(solver: Callable[..., Tensor]) -> None:
    parameterization = Parameterization.of("v", NO_SIGNAL)
    complaint = "start at 1000, where alpha_bar is 0, .* start at 999 or below, or take dpm_solver"
    with pytest.raises(ValueError, match=complaint):
        solver(X0Estimator(NO_SIGNAL, rough, parameterization), noise_at(0), (1000, 500, 0))
    end = solver(X0Estimator(NO_SIGNAL, rough, parameterization), noise_at(0), (999, 500, 0))
    assert end.isfinite().all()


@pytest.mark.parametrize("h", [1e-4, 1e-3, 0.1, 0.999999, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("nodes", [(-0.7, -1.9), (1.0, -1.0), (1.0, -1.0, -2.0), (1.0, -0.3, -0.4)])
def test_weights_are_the_integrals_of_lagranges_polynomials(
    nodes: tuple[float, ...], h: float
) -> None:
    """mpmath's quadrature of the polynomial that is 1 at one node, with exp(h r) as density."""
    all_nodes = [mpmath.mpf(0), *map(mpmath.mpf, nodes)]
    points = [0, *(1 - mpmath.mpf(10) ** -k for k in range(1, 4)), 1]  # the mass lies near 1

    def basis(i: int, r: Any) -> Any:
        others = [node for j, node in enumerate(all_nodes) if j != i]
        return mpmath.fprod((r - node) / (all_nodes[i] - node) for node in others)

    mass = mpmath.quad(lambda r: mpmath.exp(h * (r - 1)), points)
    for i, found in enumerate(_weights(nodes, h)):
        exact = mpmath.quad(lambda r, i=i: mpmath.exp(h * (r - 1)) * basis(i, r), points) / mass
        assert found == pytest.approx(float(exact), rel=1e-11, abs=1e-11)
