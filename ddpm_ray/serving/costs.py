"""The cost of a sampling or editing job, counted before it runs."""

from itertools import pairwise

from ddpm_ray.diffusion.guidance import scale_by_step
from ddpm_ray.diffusion.inpainting import jump_schedule
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.sampling import SamplingPlan


def network_rows(
    denoiser: Denoiser,
    plan: SamplingPlan,
    images: int,
    *,
    windows: int = 1,
    strength: float = 1.0,
    painting: Painting | None = None,
) -> int:
    """The number of images of all network calls: steps, guidance, windows, resamples.

    Of sample, inpaint, outpaint and image_to_image; cascades and inversions are not counted here.
    `windows` are those of one image (editing.windows), `strength` is that of image_to_image, and
    `painting` the method of an inpainting; `auto` must be chosen. Calls of a guidance model are not
    counted.
    """
    steps = [t for t in plan.steps if t <= round(strength * denoiser.schedule.num_steps)]
    if painting is not None and painting.method == "repaint":
        walk = jump_schedule(steps, painting.jump_length, painting.resamples)
        called = [t for t, s in pairwise(walk) if s < t]
    elif plan.settings.sampler == "heun":  # a call at each end of a transition, but at t = 0
        called = [t for pair in pairwise(steps) for t in pair if t > 0]
    else:
        called = steps[:-1]
    guidance = plan.guidance
    scales = [guidance.scale] * (denoiser.schedule.num_steps + 1)
    if guidance.interval is not None and guidance.scale != 1:
        scales = scale_by_step(guidance.scale, guidance.interval, denoiser.parameterization)
    return images * windows * sum(1 if scales[t] in (0, 1) else 2 for t in called)
