"""The plan of a job: the images that it draws, and the network calls that they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.sampling import Images, SamplingPlan, sampling_plan
from ddpm_ray.serving.costs import JobCost, job_cost
from ddpm_ray.serving.image_requests import EXTENSIONS, ImageRequest, named_field
from ddpm_ray.serving.request_errors import RequestError

Act: TypeAlias = Callable[[DrawingModel, OnStep], Images]


@dataclass(frozen=True)
class RequestLimits:
    """The largest requests of a server."""

    max_steps: int = 1000
    max_pixels: int = 4_194_304  # of an uploaded image
    max_windows: int = 1024  # of the canvas of an edit, times its images; all are in memory


class JobPlan(NamedTuple):
    """Images to draw, and their network calls."""

    chosen: dict[str, Any]  # settings of the call
    plan: SamplingPlan
    called: list[int]  # the step of each network call, in turn
    images: int  # rows of a call without guidance
    act: Act
    facts: dict[str, Any]  # how the images are drawn: enough to draw them again

    def cost(self, model: DrawingModel) -> JobCost:
        """The network calls that it takes."""
        return job_cost(model, self.plan, self.called, self.images)

    @property
    def shown_steps(self) -> int:
        """Number of calls of on_step."""
        calls = len(self.called)
        return (calls + 1) // 2 if self.plan.settings.sampler == "heun" else calls


def chosen_settings(
    request: ImageRequest,
    settings: Mapping[str, Any],
    model: DrawingModel,
    limits: RequestLimits,
    windows: int = 1,
) -> tuple[dict[str, Any], SamplingPlan, dict[str, Any]]:
    """The settings of the call, the plan that they give, and its facts."""
    given = dict(settings)
    if isinstance(seed := given["seed"], int) and seed < 0:
        raise RequestError(f"seed is {seed}; it must be at least 0", "seed")
    if request.prompt:
        given["prompts"] = [request.prompt]
    given["batch_size"] = request.n * windows  # all images in one walk
    try:
        configured = model.with_settings(**given)
    except (TypeError, ValueError) as error:
        raise of_error(error, given) from error
    void = without_effect(configured.settings)
    for name in (name for name in void if given.get(name)):
        raise RequestError(
            f"{name} is {given[name]}, and has no effect with {void[name]}: leave one of them out",
            name,
        )
    if (steps := configured.settings.steps) > limits.max_steps:
        raise RequestError(
            f"steps is {steps}; this server allows at most {limits.max_steps}", "steps"
        )
    if windows * request.n > limits.max_windows:
        raise RequestError(
            f"size is too large: its windows of the model's size, times n, are "
            f"{windows * request.n}, and this server allows at most {limits.max_windows}",
            "size",
        )
    names = model.label_names if configured.settings.has_names else None
    plan = sampling_plan(configured.settings, model.denoiser.schedule, names)
    drawn = {name: getattr(plan.settings, name) for name in EXTENSIONS}
    facts = {
        name: value for name, value in drawn.items() if value not in ("", ()) and name not in void
    }
    tokenizer = model.denoiser.takes.tokenizer
    if request.prompt and tokenizer is not None and tokenizer.too_long([request.prompt]):
        facts["prompt_cut_to_tokens"] = tokenizer.length
    return given, plan, {"prompt": request.prompt, **facts}


def without_effect(chosen: SamplingSettings) -> dict[str, str]:
    """The settings that others make void, each with the setting that does."""
    found = {} if chosen.sampler == "ddim" else {"eta": f"sampler {chosen.sampler}"}
    if chosen.guidance_scale == 1:
        found["guidance_rescale"] = "guidance_scale 1"
    return found


def of_error(error: Exception, given: Mapping[str, Any] | None = None) -> RequestError:
    """The error of a setting; it names the field, of those that the request has if one is in it."""
    text = re.sub(r"^prompts\b", "prompt", str(error))
    sent = [name for name in given or () if re.search(rf"\b{name}\b", text)]
    first = named_field(text)
    return RequestError(text, first if first in sent or not sent else named_field(sent[0]))
