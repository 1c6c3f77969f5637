"""What the samplers cost beside the network calls they make.

    python benchmarks/sampling.py

The small U-Net (2.2 M parameters) at batch 16 of 3x32x32 images, noise drawn per image; one thread,
CPU seconds, interleaved rounds, medians. The first ratio compares whole walks with the same number
of bare calls. The second adds the sampler's own time, measured with a denoiser that costs nothing,
to that of a bare call: the same figure, less the noise of a shared machine.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_ray.diffusion import Denoise, NoiseSchedule, schedules
from ddpm_ray.diffusion.samplers import ancestral, ddim
from ddpm_ray.diffusion.seeding import Purpose, normal
from ddpm_ray.diffusion.spacing import uniform_steps
from ddpm_ray.models.unet import UNet

BATCH, SHAPE, CALLS, ROUNDS = 16, (3, 32, 32), 5, 25


def small_unet() -> UNet:
    return UNet(image_size=32, image_channels=3, base_channels=32, groups=8).eval()


def walks(denoise: Denoise) -> dict[str, Callable[[], object]]:
    """Each makes CALLS network calls; the first makes nothing else."""
    schedule, steps = NoiseSchedule(schedules.linear(1000)), uniform_steps(1000, CALLS)
    index = torch.arange(BATCH)
    x_T = normal(0, Purpose.SAMPLE_START, 0, index, SHAPE)

    def noise(t: int) -> Tensor:
        return normal(0, Purpose.SAMPLE_STEP, t, index, SHAPE)

    def bare() -> None:
        with torch.inference_mode():
            for t in steps[:-1]:
                denoise(x_T, torch.full((BATCH,), t))

    return {
        "bare calls": bare,
        "ancestral": lambda: ancestral(schedule, denoise, x_T, steps, noise=noise),
        "ddim, eta 0": lambda: ddim(schedule, denoise, x_T, steps),
        "ddim, eta 1": lambda: ddim(schedule, denoise, x_T, steps, eta=1, noise=noise),
    }


def cpu_s(walk: Callable[[], object]) -> float:
    start = time.process_time()
    walk()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    predicted = torch.randn(BATCH, *SHAPE)
    whole, own = walks(small_unet()), walks(lambda x_t, t: predicted)
    whole_s: dict[str, list[float]] = {name: [] for name in whole}
    own_s: dict[str, list[float]] = {name: [] for name in own}
    for _ in range(ROUNDS):
        for name in whole:
            whole_s[name].append(cpu_s(whole[name]))
            own_s[name].append(cpu_s(own[name]))
    bare_s = whole_s["bare calls"]
    call_s = statistics.median(bare_s) / CALLS
    print(f"bare call: {1000 * call_s:.1f} ms, {BATCH / call_s:.0f} images per CPU s")
    print(f"{'':11}  whole walk  by own time  own ms per call")
    for name in list(whole)[1:]:
        ratio = statistics.median(b / s for b, s in zip(bare_s, whole_s[name], strict=True))
        extra_s = statistics.median(own_s[name]) / CALLS
        by_own = call_s / (call_s + extra_s)
        print(f"{name:11}  {ratio:10.3f}  {by_own:11.3f}  {1000 * extra_s:15.2f}")


if __name__ == "__main__":
    main()
