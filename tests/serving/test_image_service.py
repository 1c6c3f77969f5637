"""Images of requests: those of the model alone, with previews, facts and errors by field."""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.engine_task import JobCancelledError
from ddpm_ray.serving.image_requests import EditRequest, ImageRequest
from ddpm_ray.serving.image_service import ImageJob, ImageService, ServiceSettings
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.uploads import Canvas
from tests.limits import ENDS_S
from tests.serving.test_engine import Counted, counted, held, model

__all__ = ["model"]  # a fixture
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
KNOWN = np.arange(64).reshape(8, 8) % 3 > 0


@pytest.fixture
def service(model: TrainedModel) -> Iterator[ImageService]:
    with ImageService({"digits": model}) as made:
        yield made


def opened(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def test_a_request_gets_the_images_of_its_settings(
    service: ImageService,
    model: TrainedModel,
) -> None:
    settings = {"seed": 3, "steps": 5, "labels": [1], "guidance_scale": 2.0}
    job = service.generate(ImageRequest(n=2), settings)
    files = job.files("png", ENDS_S)
    wanted = model.sample(2, **settings)  # type: ignore[arg-type]
    for index, file in enumerate(files):
        assert np.abs(opened(file).astype(int) - wanted[index, ..., 0]).max() <= 1
        with Image.open(io.BytesIO(file)) as image:
            facts = json.loads(image.info["ddpm_ray"])
        assert facts == {"model": "digits", "prompt": "", "index": index, **settings}
    assert list(job.previews()) == []


def test_the_seed_of_a_request_without_one_repeats_its_images(service: ImageService) -> None:
    first = service.generate(ImageRequest(), {"steps": 3})
    again = service.generate(ImageRequest(), {"steps": 3, "seed": first.facts["seed"]})
    assert first.files("webp", ENDS_S) == again.files("webp", ENDS_S)
    other = service.generate(ImageRequest(), {"steps": 3})
    assert other.facts["seed"] != first.facts["seed"]


def test_previews_come_from_the_first_step_on(service: ImageService) -> None:
    request = ImageRequest(stream=True, partial_images=3, n=2)
    job = service.generate(request, {"steps": 9, "seed": 1})
    previews = list(job.previews())
    assert [preview.number for preview in previews] == [0, 1, 2]
    assert {preview.images.shape for preview in previews} == {(2, 8, 8, 1)}
    assert all(file[:4] == b"\x89PNG" for file in job.files("png", ENDS_S))


@pytest.mark.parametrize("method", ["repaint", "replacement"])
def test_an_edit_keeps_what_is_known(service: ImageService, method: str) -> None:
    request = EditRequest(method=method, resamples=2, n=2)  # type: ignore[arg-type]
    job = service.edit(request, {"steps": 4, "seed": 1}, Canvas(PIXELS, KNOWN))
    for file in job.files("png", ENDS_S):
        assert np.array_equal(opened(file)[KNOWN], PIXELS[KNOWN, 0])
    assert job.job.computed == job.rows


def test_an_edit_without_a_mask_varies_the_image(
    service: ImageService,
    model: TrainedModel,
) -> None:
    job = service.edit(EditRequest(strength=0.5), {"steps": 6, "seed": 2}, Canvas(PIXELS, None))
    wanted = model.image_to_image(PIXELS[None], 0.5, steps=6, seed=2)[0, ..., 0]
    assert np.abs(opened(job.files("png", ENDS_S)[0]).astype(int) - wanted).max() <= 1


def test_a_larger_canvas_is_painted_in_windows(service: ImageService) -> None:
    canvas = Canvas(np.zeros((12, 8, 1), np.uint8), np.arange(96).reshape(12, 8) < 64)
    job = service.edit(EditRequest(method="replacement"), {"steps": 3}, canvas)
    assert opened(job.files("png", ENDS_S)[0]).shape == (12, 8)
    assert job.job.computed == 2 * 3


@pytest.mark.parametrize(
    "request_, settings, param, status",
    [
        (ImageRequest(model="cats"), {}, "model", 404),
        (ImageRequest(size="64x64"), {}, "size", 400),
        (ImageRequest(prompt="a cat"), {}, "prompt", 400),
        (ImageRequest(), {"steps": 21}, "steps", 400),
        (ImageRequest(), {"steps": 15}, "steps", 400),  # of the service
        (ImageRequest(), {"seed": -1}, "seed", 400),
        (ImageRequest(), {"sampler": "euler"}, "sampler", 400),
        (ImageRequest(), {"labels": [7]}, "labels", 400),
        (EditRequest(strength=0.001), {}, "strength", 400),
    ],
)
def test_what_cannot_be_served_names_its_field(
    request_: ImageRequest,
    settings: dict[str, object],
    param: str,
    status: int,
    model: TrainedModel,
) -> None:
    with ImageService({"digits": model}, ServiceSettings(max_steps=12)) as service:
        settings = {"steps": 4, **settings}
        serve: Callable[[], ImageJob] = partial(service.generate, request_, settings)
        if isinstance(request_, EditRequest):
            serve = partial(service.edit, request_, settings, Canvas(PIXELS, None))
        with pytest.raises(RequestError, match=r"\w") as refused:
            serve()
        assert (refused.value.param, refused.value.status) == (param, status)
        small = Canvas(PIXELS[:5], KNOWN[:5])
        with pytest.raises(RequestError, match=r"image is 8 x 5 .*at least 8 x 8: enlarge it"):
            service.edit(EditRequest(), {"steps": 4}, small)


def test_too_much_work_is_refused_with_a_time(
    model: TrainedModel,
) -> None:
    with ImageService({"digits": model}, ServiceSettings(max_queued_s=1e-6)) as service:
        service.generate(ImageRequest(), {"steps": 2}).files("png", ENDS_S)
        held(model)
        running = service.generate(ImageRequest(), {"steps": 20})
        with pytest.raises(RequestError, match="try again in 1 s") as refused:
            service.generate(ImageRequest(), {"steps": 2})
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        assert refused.value.body()["error"]["type"] == "rate_limit_error"
        running.cancel()
        counted(model).go_on.set()
        with pytest.raises(JobCancelledError, match="the job was cancelled"):
            running.files("png", ENDS_S)
    assert isinstance(model.denoiser.network, Counted)
