"""The plan of a request: the images that it draws, and the network calls that they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images, SamplingPlan, sampling_plan
from ddpm_ray.serving.costs import JobCost, called_steps, job_cost
from ddpm_ray.serving.image_requests import EXTENSIONS, EditRequest, ImageRequest, named_field
from ddpm_ray.serving.orders import ImageOrder
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.uploads import Canvas, read_canvas

Act: TypeAlias = Callable[[DrawingModel, OnStep], Images]


@dataclass(frozen=True)
class RequestLimits:
    """The largest requests of a server."""

    max_steps: int = 1000
    max_pixels: int = 4_194_304  # of an uploaded image
    max_windows: int = (
        1024  # of the canvas of an edit, times its images: they are in memory at once
    )


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


def planned(order: ImageOrder, name: str, model: DrawingModel, limits: RequestLimits) -> JobPlan:
    """Plan an order for the model of that name. Raises RequestError."""
    request, settings = order.request, order.settings
    if order.kind == "generation":
        return _generation(request, settings, name, model, limits)
    assert order.image is not None
    if order.kind == "variation":
        channels = model.image_shape.channels
        canvas = read_canvas(order.image, None, channels, limits.max_pixels)
        return _variation(request, settings, model, canvas, limits)
    if not isinstance(model, TrainedModel):
        raise RequestError(f"{name} is a cascade, which edits no images: name its decoder", "model")
    canvas = read_canvas(
        order.image,
        order.mask,
        model.image_shape.channels,
        limits.max_pixels,
        request.wanted_size,
    )
    assert isinstance(request, EditRequest)
    return _edit(request, settings, model, canvas, limits)


def _generation(
    request: ImageRequest,
    settings: Mapping[str, Any],
    name: str,
    model: DrawingModel,
    limits: RequestLimits,
) -> JobPlan:
    height, width, _ = model.drawn_shape
    if request.wanted_size not in (None, (height, width)):
        raise RequestError(
            f"size is {request.size}; images of {name} have {width}x{height}: leave it out, "
            "or extend an image by an edit with a larger canvas",
            "size",
        )
    if isinstance(model, Cascade) and not request.prompt:
        raise RequestError(f"prompt is empty, and {name} needs a text", "prompt")
    chosen, plan, facts = _chosen(request, settings, model, limits)

    def act(model: DrawingModel, on_step: OnStep) -> Images:
        return model.sample(request.n, on_step=on_step, **chosen)

    return JobPlan(chosen, plan, called_steps(model.denoiser, plan), request.n, act, facts)


def _variation(
    request: ImageRequest,
    settings: Mapping[str, Any],
    model: DrawingModel,
    canvas: Canvas,
    limits: RequestLimits,
) -> JobPlan:
    if canvas.pixels.shape[:2] != model.image_size:
        height, width = model.image_size
        found = f"{canvas.pixels.shape[1]} x {canvas.pixels.shape[0]}"
        raise RequestError(
            f"image is {found} (width x height); variations are drawn of images of "
            f"{width} x {height}",
            "image",
        )
    if model.denoiser.takes.image_encoder is None:
        raise RequestError(
            "the model draws no variations: it is not given the embedding of an image; vary the "
            "image by an edit without a mask",
            "model",
        )
    chosen, plan, facts = _chosen(request, settings, model, limits)

    def act(model: DrawingModel, on_step: OnStep) -> Images:
        assert isinstance(model, TrainedModel | Cascade)
        return model.variations(canvas.pixels[None], per_image=request.n, on_step=on_step, **chosen)

    return JobPlan(chosen, plan, called_steps(model.denoiser, plan), request.n, act, facts)


def _edit(
    request: EditRequest,
    settings: Mapping[str, Any],
    model: TrainedModel,
    canvas: Canvas,
    limits: RequestLimits,
) -> JobPlan:
    """Repaint the marked part of a canvas, or vary all of it."""
    windows, known = _windows(model, canvas), canvas.known
    images = np.repeat(canvas.pixels[None], request.n, axis=0)
    if known is None:
        chosen, plan, facts = _chosen(request, settings, model, limits, windows)
        called = called_steps(model.denoiser, plan, strength=request.strength)
        if not called:
            steps = f"none of {len(plan.steps) - 1} steps is within that share of the noise"
            raise RequestError(
                f"strength is {request.strength:g}; {steps}: raise it or steps", "strength"
            )

        def vary(model: DrawingModel, on_step: OnStep) -> Images:
            assert isinstance(model, TrainedModel)
            return model.image_to_image(images, request.strength, on_step=on_step, **chosen)

        return JobPlan(
            chosen, plan, called, request.n * windows, vary, facts | {"strength": request.strength}
        )
    try:
        painting = Painting(request.method, request.resamples).chosen_for(model.denoiser)
    except ValueError as error:
        raise _of_error(error) from error
    if painting.method == "repaint":
        settings = {"sampler": "ancestral", "variance": "fixed_small", **settings}
    chosen, plan, facts = _chosen(request, settings, model, limits, windows)
    called = called_steps(model.denoiser, plan, painting=painting)
    how: dict[str, Any] = {"method": painting.method}
    if painting.method == "repaint":
        how["resamples"] = request.resamples

    def paint(model: DrawingModel, on_step: OnStep) -> Images:
        assert isinstance(model, TrainedModel)
        return model.inpaint(images, known, on_step=on_step, **how, **chosen)

    return JobPlan(chosen, plan, called, request.n * windows, paint, facts | how)


def _chosen(
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
        raise _of_error(error, given) from error
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
    facts = {name: value for name, value in drawn.items() if value not in ("", ())}
    tokenizer = model.denoiser.takes.tokenizer
    if request.prompt and tokenizer is not None and tokenizer.too_long([request.prompt]):
        facts["prompt_cut_to_tokens"] = tokenizer.length
    return given, plan, {"prompt": request.prompt, **facts}


def _windows(model: DrawingModel, canvas: Canvas) -> int:
    """Windows of a canvas; RequestError for one that is smaller than the model's images."""
    factor, shape = model.denoiser.codec.factor, canvas.pixels.shape[:2]
    if any(own < side for own, side in zip(shape, model.image_size, strict=True)):
        height, width = model.image_size
        raise RequestError(
            f"image is {shape[1]} x {shape[0]} (width x height), and the model edits images of "
            f"at least {width} x {height}: enlarge it, or give a larger size",
            "image",
        )
    rows, columns = (-(-side // factor) for side in shape)
    return editing.windows(rows, columns, model.denoiser.codec.shape(model.image_shape)[1:])


def _of_error(error: Exception, given: Mapping[str, Any] | None = None) -> RequestError:
    """The error of a setting; it names the field, of those that the request has if one is in it."""
    text = re.sub(r"^prompts\b", "prompt", str(error))
    sent = [name for name in given or () if re.search(rf"\b{name}\b", text)]
    first = named_field(text)
    return RequestError(text, first if first in sent or not sent else named_field(sent[0]))
