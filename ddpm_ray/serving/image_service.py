"""Images of requests: a job of an engine for each, with previews, files and what they were made by.

No HTTP and no Ray here. Requests of one model share the batches of its engine.
"""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling import editing
from ddpm_ray.sampling.editing import Painting
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images, SamplingPlan, sampling_plan
from ddpm_ray.serving.costs import called_steps, network_rows
from ddpm_ray.serving.engine import Engine, EngineSettings
from ddpm_ray.serving.engine_task import EngineJob
from ddpm_ray.serving.image_files import FileFormat, encoded_image
from ddpm_ray.serving.image_requests import EditRequest, ImageRequest, named_field
from ddpm_ray.serving.limits import OverloadedError, QueueLimit
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.uploads import Canvas

Act: TypeAlias = Callable[[TrainedModel, OnStep], Images]
SEEDS = 2**31  # of requests without a seed; a client that knows it repeats the images


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of the service."""

    max_queued_s: float = 60.0  # of accepted work, at the measured rate
    max_steps: int = 1000  # of one request
    max_pixels: int = 4_194_304  # of an uploaded image


@dataclass(frozen=True)
class Preview:
    """An estimate of the images while they are drawn."""

    number: int  # 0, 1, ... of the previews of its request
    images: Images  # uint8 [n, h, w, C]


class ImageJob:
    """The images of a request: previews as they come, then the files."""

    def __init__(
        self,
        job: EngineJob[Images],
        rows: int,
        facts: dict[str, Any],
        made: queue.SimpleQueue[Preview | None],
    ) -> None:
        self.job, self.rows, self.facts, self._made = job, rows, facts, made
        job.when_done(lambda: made.put(None))

    def previews(self) -> Iterator[Preview]:
        """Yield previews until the images are there or the job has failed; read them once."""
        while (preview := self._made.get()) is not None:
            yield preview

    def files(self, output_format: FileFormat, timeout_s: float | None = None) -> list[bytes]:
        """Wait for the images and encode them; each has the facts of its drawing inside, if PNG.

        Raises what the job raised, as JobCancelledError, and TimeoutError.
        """
        images = self.job.result(timeout_s)
        return [
            encoded_image(image, output_format, self.facts | {"index": index})
            for index, image in enumerate(images)
        ]

    def cancel(self) -> None:
        """End the job before its next step."""
        self.job.cancel()


class ImageService:
    """Serves models by name, each by an engine of its own. Close it, or use it in a `with`."""

    def __init__(
        self,
        models: Mapping[str, TrainedModel],
        settings: ServiceSettings | None = None,
        engine: EngineSettings | None = None,
    ) -> None:
        if not models:
            raise ValueError("models is empty; a service serves at least one")
        self.settings = settings or ServiceSettings()
        self.models = dict(models)
        self._engines = {name: Engine(engine or EngineSettings()) for name in models}
        self._shared = {name: self._engines[name].shared(model) for name, model in models.items()}

    def __enter__(self) -> ImageService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all jobs."""
        for engine in self._engines.values():
            engine.close()

    def generate(self, request: ImageRequest, settings: Mapping[str, Any]) -> ImageJob:
        """Draw images. Raises RequestError."""
        name, model = self._model(request)
        if request.wanted_size not in (None, model.image_size):
            height, width = model.image_size
            raise RequestError(
                f"size is {request.size}; images of {name} have {width}x{height}: leave it out, "
                "or extend an image by an edit with a larger canvas",
                "size",
            )
        chosen, plan = self._chosen(request, settings, model)
        work = _Work(plan, called_steps(model.denoiser, plan), request.n)

        def act(model: TrainedModel, on_step: OnStep) -> Images:
            return model.sample(request.n, on_step=on_step, **chosen)

        return self._started(request, name, chosen, work, act)

    def edit(self, request: EditRequest, settings: Mapping[str, Any], canvas: Canvas) -> ImageJob:
        """Repaint the marked part of a canvas, or vary all of it. Raises RequestError."""
        name, model = self._model(request)
        windows, known = _windows(model, canvas), canvas.known
        images = np.repeat(canvas.pixels[None], request.n, axis=0)
        if known is None:
            chosen, plan = self._chosen(request, settings, model, windows)
            called = called_steps(model.denoiser, plan, strength=request.strength)
            if not called:
                steps = f"none of {len(plan.steps) - 1} steps is within that share of the noise"
                raise RequestError(
                    f"strength is {request.strength:g}; {steps}: raise it or steps", "strength"
                )

            def vary(model: TrainedModel, on_step: OnStep) -> Images:
                strength = request.strength
                return model.image_to_image(images, strength, on_step=on_step, **chosen)

            work = _Work(plan, called, request.n * windows)
            return self._started(request, name, chosen, work, vary)
        try:
            painting = Painting(request.method, request.resamples).chosen_for(model.denoiser)
        except ValueError as error:
            raise _of_error(error) from error
        if painting.method == "repaint":
            settings = {"sampler": "ancestral", "variance": "fixed_small", **settings}
        chosen, plan = self._chosen(request, settings, model, windows)
        called = called_steps(model.denoiser, plan, painting=painting)

        def paint(model: TrainedModel, on_step: OnStep) -> Images:
            how: dict[str, Any] = {"method": request.method, "resamples": request.resamples}
            return model.inpaint(images, known, on_step=on_step, **how, **chosen)

        work = _Work(plan, called, request.n * windows)
        return self._started(request, name, chosen, work, paint)

    def _model(self, request: ImageRequest) -> tuple[str, TrainedModel]:
        name = request.model or next(iter(self.models))
        if name not in self.models:
            raise RequestError(
                f"there is no model {name!r}; there are {', '.join(self.models)}",
                "model",
                status=404,
                code="model_not_found",
            )
        return name, self.models[name]

    def _chosen(
        self,
        request: ImageRequest,
        settings: Mapping[str, Any],
        model: TrainedModel,
        windows: int = 1,
    ) -> tuple[dict[str, Any], SamplingPlan]:
        """The settings of the call, with a seed, and the plan that they give. RequestError."""
        given: dict[str, Any] = {"seed": secrets.randbelow(SEEDS), **settings}
        if isinstance(given["seed"], int) and given["seed"] < 0:
            raise RequestError(f"seed is {given['seed']}; it must be at least 0", "seed")
        if request.prompt:
            given["prompts"] = [request.prompt]
        given["batch_size"] = request.n * windows  # all images in one walk
        try:
            configured = model.with_settings(**given)
        except (TypeError, ValueError) as error:
            raise _of_error(error) from error
        if (steps := configured.settings.steps) > self.settings.max_steps:
            limit = self.settings.max_steps
            raise RequestError(f"steps is {steps}; this server allows at most {limit}", "steps")
        names = model.label_names if configured.settings.has_names else None
        return given, sampling_plan(configured.settings, model.denoiser.schedule, names)

    def _started(
        self, request: ImageRequest, name: str, chosen: dict[str, Any], work: _Work, act: Act
    ) -> ImageJob:
        """Start the job if there is room for its cost. Raises RequestError with status 429."""
        engine, model = self._engines[name], self._shared[name]
        rows = network_rows(model.denoiser, work.plan, work.called, work.images)
        try:
            QueueLimit(self.settings.max_queued_s, lambda: engine.load).require_room(rows)
        except OverloadedError as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise RequestError(str(error), status=429, headers=headers) from error
        made: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
        show = _Previews(model, request.partial_images, work.shown_steps, made)
        job = engine.submit(lambda: act(model, show), images=work.images, cost=rows)
        facts: dict[str, Any] = {"model": name, "prompt": request.prompt}
        facts |= {k: v for k, v in chosen.items() if k not in ("prompts", "batch_size")}
        for key in ("checkpoint", "weights_sha256"):
            if key in model.provenance:
                facts[key] = model.provenance[key]
        return ImageJob(job, rows, facts, made)


class _Work(NamedTuple):
    """The network calls of a job."""

    plan: SamplingPlan
    called: list[int]  # steps
    images: int  # rows of a call without guidance

    @property
    def shown_steps(self) -> int:
        """Number of calls of on_step."""
        calls = len(self.called)
        return (calls + 1) // 2 if self.plan.settings.sampler == "heun" else calls


class _Previews:
    """Puts `count` estimates of the images, of evenly spaced steps from the first on, in `made`."""

    def __init__(
        self, model: TrainedModel, count: int, steps: int, made: queue.SimpleQueue[Preview | None]
    ) -> None:
        self._model, self._made, self._seen = model, made, 0
        self._due: dict[int, int] = {}
        for number in range(count):
            self._due[number * steps // count] = number

    def __call__(self, t: int, x_t: Tensor, x_0: Tensor) -> None:
        """Show the estimate x_0 if it is due."""
        number = self._due.get(self._seen)
        self._seen += 1
        if number is not None:
            self._made.put(Preview(number, self._model.preview(x_0)))


def _windows(model: TrainedModel, canvas: Canvas) -> int:
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


def _of_error(error: Exception) -> RequestError:
    """The error of a setting, which names its field."""
    return RequestError(str(error), named_field(str(error)))
