"""The cost of the samplers, without the network calls they make.

    python benchmarks/sampling.py

The small U-Net (2.2 M parameters) at batch 16 of 3x32x32 images, noise drawn per image; one thread,
CPU seconds, interleaved rounds, medians. The first ratio compares whole walks with the same number
of bare calls. The second adds the sampler's own time, measured with a denoiser that costs nothing,
to that of a bare call: the same figure, less the noise of a shared machine. `guided` is
classifier-free guidance, whose bare calls are of 32 images.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.diffusion import Denoise, NoiseSchedule, Parameterization, schedules, solvers
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.guidance import classifier_free
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.timestep_spacing import uniform_steps
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

BATCH, SHAPE, STEPS, ROUNDS = 16, (3, 32, 32), 5, 15


@dataclass(frozen=True)
class Walk:
    """A sampler, and what it asks of the network."""

    run: Callable[[Denoise], object]
    calls: int = STEPS
    batch: int = BATCH


def small_unet() -> UNet:
    return UNet(UNetSpec(image_channels=3, base_channels=32, groups=8)).eval()


def walks() -> dict[str, Walk]:
    schedule, steps = NoiseSchedule(schedules.linear(1000)), uniform_steps(1000, STEPS)
    index, labels = torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64)
    x_T = normal(0, Purpose.SAMPLE_START, 0, index, SHAPE)
    epsilon, estimate = Parameterization.of("epsilon", schedule), partial(X0Estimator, schedule)

    def noise(t: int) -> Tensor:
        return normal(0, Purpose.SAMPLE_STEP, t, index, SHAPE)

    def guided(denoise: Denoise) -> object:
        guided = classifier_free(
            lambda x, t, _: denoise(x, t),
            Conditioning(labels),
            3.0,
            rescale=0.7,
            parameterization=epsilon,
        )
        return ddim(estimate(guided), x_T, steps)

    return {
        "ancestral": Walk(lambda d: ancestral(estimate(d), x_T, steps, noise=noise)),
        "ddim, eta 0": Walk(lambda d: ddim(estimate(d), x_T, steps)),
        "ddim, eta 1": Walk(lambda d: ddim(estimate(d), x_T, steps, eta=1, noise=noise)),
        "DPM-Solver++": Walk(lambda d: solvers.dpm_solver_pp(estimate(d), x_T, steps)),
        "its SDE form": Walk(lambda d: solvers.dpm_solver_pp(estimate(d), x_T, steps, noise=noise)),
        "UniPC": Walk(lambda d: solvers.unipc(estimate(d), x_T, steps)),
        "Heun": Walk(lambda d: solvers.heun(estimate(d), x_T, steps), calls=2 * STEPS - 1),
        "PLMS": Walk(lambda d: solvers.plms(estimate(d), x_T, steps)),
        "guided": Walk(guided, batch=2 * BATCH),
    }


def bare(denoise: Denoise, calls: int, batch: int) -> Callable[[], object]:
    """Network calls alone."""
    x_T, t = torch.randn(batch, *SHAPE), torch.full((batch,), 500)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                denoise(x_T, t)

    return run


def cpu_s(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    network, answers = small_unet(), torch.randn(2 * BATCH, *SHAPE)

    def free(x_t: Tensor, t: Tensor) -> Tensor:
        return answers[: len(x_t)]

    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in walks()}
    for _ in range(ROUNDS):
        for name, walk in walks().items():
            bare_s = cpu_s(bare(network, walk.calls, walk.batch))
            whole_s = cpu_s(partial(walk.run, network))
            own_s = cpu_s(partial(walk.run, free))
            found[name].append((bare_s, whole_s, own_s))
    first = statistics.median(bare_s for bare_s, _, _ in found["ancestral"]) / STEPS
    print(f"bare call: {1000 * first:.1f} ms, {BATCH / first:.0f} images per CPU s")
    print(f"{'':13} whole walk  by own time  own ms per call")
    for name, rounds in found.items():
        ratio = statistics.median(bare_s / whole_s for bare_s, whole_s, _ in rounds)
        bare_s, own_s = (statistics.median(column) for column in (*zip(*rounds, strict=True),)[::2])
        own_ms = 1000 * own_s / walks()[name].calls
        print(f"{name:13} {ratio:10.3f}  {bare_s / (bare_s + own_s):11.3f}  {own_ms:15.2f}")


if __name__ == "__main__":
    main()
