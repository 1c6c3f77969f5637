"""Plans of generations, edits and variations, as requests ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.serving.costs import called_steps
from ddpm_ray.serving.image_requests import RESAMPLES, STRENGTH, EditRequest, ImageRequest
from ddpm_ray.serving.job_plans import JobPlan, RequestLimits, chosen_settings, of_error
from ddpm_ray.serving.orders import ImageOrder
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.uploads import Canvas, read_canvas


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
    chosen, plan, facts = chosen_settings(request, settings, model, limits)

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
    chosen, plan, facts = chosen_settings(request, settings, model, limits)

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
        return _varied(request, settings, model, images, windows, limits)
    try:
        painting = Painting(request.method, request.resamples or RESAMPLES)
        painting = painting.chosen_for(model.denoiser)
    except ValueError as error:
        raise of_error(error) from error
    how: dict[str, Any] = {"method": painting.method}
    if painting.method == "repaint":
        settings = {"sampler": "ancestral", "variance": "fixed_small", **settings}
        how["resamples"] = painting.resamples
    _refuse_given(request, "strength", "pixels are marked, which are drawn anew as a whole")
    if painting.method != "repaint":
        _refuse_given(request, "resamples", f"the method is {painting.method!r}, not 'repaint'")
    chosen, plan, facts = chosen_settings(request, settings, model, limits, windows)
    called = called_steps(model.denoiser, plan, painting=painting)

    def paint(model: DrawingModel, on_step: OnStep) -> Images:
        assert isinstance(model, TrainedModel)
        return model.inpaint(images, known, on_step=on_step, **how, **chosen)

    return JobPlan(chosen, plan, called, request.n * windows, paint, facts | how)


def _varied(
    request: EditRequest,
    settings: Mapping[str, Any],
    model: TrainedModel,
    images: Images,
    windows: int,
    limits: RequestLimits,
) -> JobPlan:
    """Vary images as a whole."""
    for name in ("method", "resamples"):
        _refuse_given(request, name, "no pixel is marked: send a mask, or a larger size")
    strength = request.strength or STRENGTH
    chosen, plan, facts = chosen_settings(request, settings, model, limits, windows)
    called = called_steps(model.denoiser, plan, strength=strength)
    if not called:
        steps = f"none of {len(plan.steps) - 1} steps is within that share of the noise"
        raise RequestError(f"strength is {strength:g}; {steps}: raise it or steps", "strength")

    def vary(model: DrawingModel, on_step: OnStep) -> Images:
        assert isinstance(model, TrainedModel)
        return model.image_to_image(images, strength, on_step=on_step, **chosen)

    rows = request.n * windows
    return JobPlan(chosen, plan, called, rows, vary, facts | {"strength": strength})


def _refuse_given(request: EditRequest, name: str, why: str) -> None:
    """Raise RequestError for a field that was given, and has no effect."""
    if (value := getattr(request, name)) not in (None, "auto"):
        raise RequestError(f"{name} is {value}, and has no effect: {why}", name)


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
