"""The cost of a sampling or editing job, counted before it runs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ddpm_ray.diffusion.guidance import scale_by_step
from ddpm_ray.diffusion.inpainting import jump_schedule
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.sampling import SamplingPlan, sampling_plan


def called_steps(
    denoiser: Denoiser,
    plan: SamplingPlan,
    *,
    strength: float = 1.0,
    painting: Painting | None = None,
) -> list[int]:
    """The steps at which a job calls the network, in turn.

    `strength` is that of image_to_image, and `painting` the method of an inpainting; `auto` must be
    chosen.
    """
    steps = [t for t in plan.steps if t <= round(strength * denoiser.schedule.num_steps)]
    if painting is not None and painting.method == "repaint":
        walk = jump_schedule(steps, painting.jump_length, painting.resamples)
        return [t for t, s in pairwise(walk) if s < t]
    if plan.settings.sampler == "heun":  # a call at each end of a transition, but at t = 0
        return [t for pair in pairwise(steps) for t in pair if t > 0]
    return steps[:-1]


def network_rows(denoiser: Denoiser, plan: SamplingPlan, called: Sequence[int], images: int) -> int:
    """The number of images of all network calls at the steps `called`, with guidance.

    Of sample, inpaint, outpaint and image_to_image of one network; inversions are not counted.
    `images` is the number of images of a job, times that of the windows of one (editing.windows).
    Calls of a guidance model are not counted.
    """
    guidance = plan.guidance
    scales = [guidance.scale] * (denoiser.schedule.num_steps + 1)
    if guidance.interval is not None and guidance.scale != 1:
        scales = scale_by_step(guidance.scale, guidance.interval, denoiser.parameterization)
    return images * sum(1 if scales[t] in (0, 1) else 2 for t in called)


class JobCost(NamedTuple):
    """The network calls of a job."""

    rows: int  # images of all calls
    megapixels: float  # of these


def job_cost(
    model: DrawingModel, plan: SamplingPlan, called: Sequence[int], images: int
) -> JobCost:
    """The cost of a job with the steps `called`, with all stages of a cascade.

    A row of a prior counts as a row, and has no pixels. See network_rows for `images`.
    """
    rows = network_rows(model.denoiser, plan, called, images)
    height, width = model.image_size
    pixels = rows * height * width
    if isinstance(model, Cascade):
        if plan.settings.prompts:
            prior = model.prior
            own = sampling_plan(prior.settings, prior.denoiser.schedule)
            steps = called_steps(prior.denoiser, own)
            rows += network_rows(prior.denoiser, own, steps, images * model.candidates)
        for stage in model.upsamplers:
            own = sampling_plan(stage.settings, stage.denoiser.schedule)
            more = network_rows(stage.denoiser, own, called_steps(stage.denoiser, own), images)
            rows, pixels = rows + more, pixels + more * stage.image_size[0] * stage.image_size[1]
    return JobCost(rows, pixels / 1e6)
