"""Samplers beside those of diffusers 0.42, an independent implementation: equal images.

Theirs work in float32 on steps 0..T-1, ours in float64 coefficients on 1..T: t is theirs plus 1.
The network is any smooth function of x_t and t; the tolerance is what float32 leaves.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.choices import Prediction, ReverseVariance
from ddpm_ray.config.loading import to_dict
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.solvers import dpm_solver_pp, unipc
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from ddpm_ray.models.interop.diffusers_pipelines import ModelTraits, to_pipeline
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import run_sampler, sampling_plan

SCHEDULE = NoiseSchedule(schedules.linear(1000))
KINDS: dict[Prediction, str] = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}
STEPS = uniform_steps(1000, 10)
UNEVEN = (1000, 850, 700, 480, 300, 170, 60, 20, 3, 1, 0)  # 1: else theirs ends in noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs: numpy 2


@pytest.fixture(scope="module")
def diffusers() -> Any:  # the package of no types, and of no use but here
    return pytest.importorskip("diffusers", reason="pip install 'ddpm-ray[dev]'")


def network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.8 * x_t + 0.3 * x_t.roll(1, -1)) + 0.1 * torch.sin(t.view(-1, 1) / 100)


def noises(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(8, 32, generator=generator)


def made(kind: Callable[..., Any], **choices: Any) -> Any:
    """Their scheduler, with our table: their own is float32, which moves images by 7e-5."""
    scheduler = kind(beta_start=1e-4, beta_end=0.02, **choices)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar[1:]
    return scheduler


def theirs(scheduler: Any, timesteps: Tensor, **choices: Any) -> Tensor:
    """The images of a diffusers scheduler, its network told t as ours is."""
    x = next(noises(0))
    for t in timesteps:
        model_output = network(x, torch.full((8,), int(t) + 1))
        pictures = (
            model_output[..., None, None],
            t,
            x[..., None, None],
        )  # thresholding reads four axes
        x = scheduler.step(*pictures, **choices).prev_sample[..., 0, 0]
    return x


def assert_equal_images(one: Tensor, other: Tensor) -> None:
    """To rounding of the largest pixel, which no training holds in [-1, 1] here."""
    assert one.dtype == other.dtype == torch.float32
    assert one.std() > 0.1, "nothing to compare"
    difference = (one.double() - other.double()).abs().max() / other.double().abs().max()
    assert difference < 5e-6


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_is_their_ddpm(
    diffusers: Any, kind: Prediction, variance: ReverseVariance
) -> None:
    scheduler = made(diffusers.DDPMScheduler, prediction_type=KINDS[kind], variance_type=variance)
    scheduler.set_timesteps(timesteps=[t - 1 for t in UNEVEN[:-1]])
    generator = torch.Generator().manual_seed(1)
    images = theirs(scheduler, scheduler.timesteps, generator=generator)
    fresh = noises(1)
    ours = ancestral(
        X0Estimator(SCHEDULE, network, Parameterization.of(kind, SCHEDULE)),
        next(noises(0)),
        UNEVEN,
        noise=lambda t: next(fresh),
        variance=variance,
    )
    assert_equal_images(ours, images)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_theirs(diffusers: Any, kind: Prediction, eta: float) -> None:
    scheduler = made(
        diffusers.DDIMScheduler, prediction_type=KINDS[kind], timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    choices: dict[str, Any] = {"eta": eta, "use_clipped_model_output": True}
    generator = torch.Generator().manual_seed(1)
    images = theirs(scheduler, scheduler.timesteps, generator=generator, **choices)
    fresh = noises(1)
    ours = ddim(
        X0Estimator(SCHEDULE, network, Parameterization.of(kind, SCHEDULE)),
        next(noises(0)),
        STEPS,
        eta=eta,
        noise=lambda t: next(fresh),
    )
    assert_equal_images(ours, images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [STEPS, UNEVEN, uniform_steps(1000, 25)])
def test_dpm_solver_pp_is_theirs(diffusers: Any, kind: Prediction, steps: tuple[int, ...]) -> None:
    scheduler = made(
        diffusers.DPMSolverMultistepScheduler,
        prediction_type=KINDS[kind],
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=[t - 1 for t in steps[:-1]])
    images = theirs(scheduler, scheduler.timesteps)
    ours = dpm_solver_pp(
        X0Estimator(SCHEDULE, network, Parameterization.of(kind, SCHEDULE), clip=None),
        next(noises(0)),
        steps,
    )
    assert_equal_images(ours, images)


def test_the_sde_of_dpm_solver_pp_is_theirs(diffusers: Any) -> None:
    scheduler = made(
        diffusers.DPMSolverMultistepScheduler,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=[t - 1 for t in UNEVEN[:-1]])
    images = theirs(scheduler, scheduler.timesteps, generator=torch.Generator().manual_seed(1))
    fresh = noises(1)
    ours = dpm_solver_pp(
        X0Estimator(SCHEDULE, network, clip=None),
        next(noises(0)),
        UNEVEN,
        noise=lambda t: next(fresh),
    )
    assert_equal_images(ours, images)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [10, 25])
def test_unipc_is_theirs(diffusers: Any, kind: Prediction, order: int, count: int) -> None:
    scheduler = made(
        diffusers.UniPCMultistepScheduler,
        prediction_type=KINDS[kind],
        solver_order=order,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    images = theirs(scheduler, scheduler.timesteps)
    ours = unipc(
        X0Estimator(SCHEDULE, network, Parameterization.of(kind, SCHEDULE), clip=None),
        next(noises(0)),
        uniform_steps(1000, count),
        order=order,
    )
    assert_equal_images(ours, images)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7},
        {"sampler": "ancestral"},
        {"sampler": "dpm_solver_pp"},
        {"sampler": "dpm_solver_pp_sde"},
        {"sampler": "dpm_solver_pp", "steps": 25},
    ],
    ids=str,
)
def test_an_exported_scheduler_walks_as_the_run_samples(
    diffusers: Any, settings: dict[str, Any], clip: bool
) -> None:
    """From its config alone, with the arguments that the export names: equal images."""
    sampling = SamplingSettings(**{"steps": 10, "clip": clip, **settings})
    export = to_pipeline(
        {
            "schedule": {"kind": "linear", "num_steps": 1000},
            "objective": {"prediction": "epsilon", "variance": "fixed"},
            "sampling": to_dict(sampling),
        },
        ModelTraits(),
    )
    assert export.no_equivalent == ()
    assert hasattr(diffusers, export.pipeline)
    kind = getattr(diffusers, export.scheduler["_class_name"])
    scheduler = kind.from_config(export.scheduler)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar[1:]
    call = dict(export.call)
    scheduler.set_timesteps(call.pop("num_inference_steps"))
    plan = sampling_plan(sampling, SCHEDULE)
    assert scheduler.timesteps.tolist() == [t - 1 for t in plan.steps[:-1]]
    images = theirs(
        scheduler, scheduler.timesteps, generator=torch.Generator().manual_seed(1), **call
    )
    fresh = noises(1)
    denoiser = Denoiser(
        lambda x, t, conditioning: network(x, t), Parameterization.of("epsilon", SCHEDULE)
    )
    denoise = denoiser.bind_conditioning(guidance=plan.guidance)
    ours = run_sampler(denoiser, denoise, plan, next(noises(0)), lambda t: next(fresh))
    assert_equal_images(ours, images)
