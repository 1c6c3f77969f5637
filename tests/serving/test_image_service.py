"""Images of orders: those of the model alone, with previews, facts and errors by field."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.sampling.drawing_model import fields_of
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.engine_task import JobCancelledError
from ddpm_ray.serving.image_jobs import ImageJob
from ddpm_ray.serving.image_requests import (
    EXTENSIONS,
    EditRequest,
    ImageRequest,
    VariationRequest,
)
from ddpm_ray.serving.image_service import ImageService, ServiceSettings, UnaffordableError
from ddpm_ray.serving.job_plans import RequestLimits
from ddpm_ray.serving.orders import ImageOrder, Kind
from ddpm_ray.serving.request_errors import RequestError
from tests.limits import ENDS_S
from tests.sampling.test_cascade import PROMPTS, cascade
from tests.serving.counted_model import counted, held
from tests.serving.local_server import served

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
KNOWN = np.arange(64).reshape(8, 8) % 3 > 0


@pytest.fixture
def service(model: TrainedModel) -> Iterator[ImageService]:
    with served({"digits": model}) as models:
        yield ImageService(models)


def png(pixels: np.ndarray, known: np.ndarray | None = None) -> bytes:
    """A file; transparent where it is not known."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0])
    if known is not None:
        image = Image.merge("LA", [image, Image.fromarray(np.where(known, 255, 0).astype("u1"))])
    image.save(file, "PNG")
    return file.getvalue()


def order(request: ImageRequest, image: bytes | None = None, **settings: Any) -> ImageOrder:
    kinds: dict[type, Kind] = {EditRequest: "edit", VariationRequest: "variation"}
    return ImageOrder(
        kinds.get(type(request), "generation"), request, {"seed": 0, **settings}, image
    )


def drawn(service: ImageService, request: ImageRequest, *image: bytes, **given: Any) -> ImageJob:
    return service.start(order(request, *image, **given))[0]


def opened(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def test_a_request_gets_the_images_of_its_settings(
    service: ImageService,
    model: TrainedModel,
) -> None:
    settings = {"seed": 3, "steps": 5, "labels": [1], "guidance_scale": 2.0}
    job = drawn(service, ImageRequest(n=2), **settings)
    files = job.files("png", ENDS_S)
    wanted = model.sample(2, **settings)  # type: ignore[arg-type]
    for index, file in enumerate(files):
        assert np.abs(opened(file).astype(int) - wanted[index, ..., 0]).max() <= 1
        with Image.open(io.BytesIO(file)) as image:
            facts = json.loads(image.info["ddpm_ray"])
        assert facts.items() >= {"model": "digits", "kind": "generation", "index": index}.items()
        again = {name: facts[name] for name in EXTENSIONS if name in facts}
        assert again.items() >= settings.items()
        assert np.array_equal(model.sample(2, **again), wanted)  # nothing is missing
    assert list(job.previews()) == []


def test_previews_come_from_the_first_step_on(service: ImageService) -> None:
    job = drawn(service, ImageRequest(stream=True, partial_images=3, n=2), steps=9, seed=1)
    previews = list(job.previews())
    assert [preview.number for preview in previews] == [0, 1, 2]
    assert {preview.images.shape for preview in previews} == {(2, 8, 8, 1)}
    assert all(file[:4] == b"\x89PNG" for file in job.files("png", ENDS_S))


@pytest.mark.parametrize(
    "request_",
    [EditRequest(method="repaint", resamples=2, n=2), EditRequest(method="replacement", n=2)],
)
def test_an_edit_keeps_what_is_known(service: ImageService, request_: EditRequest) -> None:
    job = drawn(service, request_, png(PIXELS, KNOWN), steps=4, seed=1)
    for file in job.files("png", ENDS_S):
        assert np.array_equal(opened(file)[KNOWN], PIXELS[KNOWN, 0])
    assert job.job.computed == job.rows


@pytest.mark.parametrize(
    "request_, param",
    [
        (EditRequest(strength=0.5), "strength"),
        (EditRequest(method="replacement", resamples=3), "resamples"),
    ],
)
def test_a_field_that_a_mask_makes_void_is_refused(
    request_: EditRequest, param: str, service: ImageService
) -> None:
    with pytest.raises(RequestError, match=f"^{param} is .* has no effect") as refused:
        drawn(service, request_, png(PIXELS, KNOWN), steps=4)
    assert (refused.value.param, refused.value.status) == (param, 400)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "unipc"])
def test_the_facts_of_an_image_are_a_request_for_it(sampler: str, service: ImageService) -> None:
    job = drawn(service, ImageRequest(), sampler=sampler, steps=4, seed=5)
    again = drawn(
        service, ImageRequest(), **{k: v for k, v in job.facts.items() if k in EXTENSIONS}
    )
    first, second = (opened(one.files("png", ENDS_S)[0]) for one in (job, again))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("known", [KNOWN, None])
def test_the_facts_of_an_edit_are_a_request_for_it(
    known: np.ndarray | None, service: ImageService
) -> None:
    image = png(PIXELS, known)
    job = drawn(service, EditRequest(), image, steps=4, seed=5)
    own = {k: v for k, v in job.facts.items() if k in ("method", "resamples", "strength")}
    settings = {k: v for k, v in job.facts.items() if k in EXTENSIONS}
    again = drawn(service, EditRequest(**own), image, **settings)
    first, second = (opened(one.files("png", ENDS_S)[0]) for one in (job, again))
    assert np.array_equal(first, second)


def test_an_edit_without_a_mask_varies_the_image(
    service: ImageService,
    model: TrainedModel,
) -> None:
    job = drawn(service, EditRequest(strength=0.5), png(PIXELS), steps=6, seed=2)
    wanted = model.image_to_image(PIXELS[None], 0.5, steps=6, seed=2)[0, ..., 0]
    assert np.abs(opened(job.files("png", ENDS_S)[0]).astype(int) - wanted).max() <= 1


def test_a_larger_canvas_is_painted_in_windows(service: ImageService) -> None:
    request = EditRequest(method="replacement", size="8x12")
    job = drawn(service, request, png(PIXELS), steps=3)
    painted = opened(job.files("png", ENDS_S)[0])
    assert painted.shape == (12, 8)
    assert np.array_equal(painted[2:10], PIXELS[..., 0])
    assert job.job.computed == 2 * 3


def test_variations_are_those_of_the_model() -> None:
    model = TrainedModel(**fields_of(cascade()))  # its decoder
    with served({"embedded": model}) as models:
        image = np.full((*model.image_size, 1), 200, np.uint8)
        request = VariationRequest(n=2, stream=True, partial_images=1)
        job = drawn(ImageService(models), request, png(image), steps=3, seed=4)
        files = job.files("png", ENDS_S)
        assert len(list(job.previews())) == 1
        wanted = model.variations(image[None], per_image=2, steps=3, seed=4)
        for file, one in zip(files, wanted, strict=True):
            assert np.abs(opened(file).astype(int) - one[..., 0]).max() <= 1
        assert job.job.computed == job.rows


def test_a_cascade_draws_prompts_in_all_its_stages() -> None:
    model = cascade()
    with served({"stages": model}) as models:
        service = ImageService(models)
        job = drawn(service, ImageRequest(prompt=PROMPTS[0], n=2), seed=4)
        files = job.files("png", ENDS_S)
        wanted = model.sample(2, prompts=[PROMPTS[0]], seed=4)
        for file, one in zip(files, wanted, strict=True):
            assert np.abs(opened(file).astype(int) - one.squeeze()).max() <= 1
        assert job.job.computed == job.rows
        with pytest.raises(RequestError, match="prompt is empty, and stages needs a text"):
            drawn(service, ImageRequest())
        with pytest.raises(RequestError, match="stages is a cascade, which edits no images"):
            drawn(service, EditRequest(prompt=PROMPTS[0]), png(PIXELS))


WRONG: list[tuple[ImageRequest, dict[str, Any], str, int]] = [
    (ImageRequest(model="cats"), {}, "model", 404),
    (ImageRequest(size="64x64"), {}, "size", 400),
    (ImageRequest(prompt="a cat"), {}, "prompt", 400),
    (ImageRequest(), {"steps": 21}, "steps", 400),
    (ImageRequest(), {"steps": 15}, "steps", 400),  # of the service
    (ImageRequest(), {"seed": -1}, "seed", 400),
    (ImageRequest(), {"sampler": "euler"}, "sampler", 400),
    (ImageRequest(), {"labels": [7]}, "labels", 400),
    (EditRequest(strength=0.001), {}, "strength", 400),
    (VariationRequest(), {}, "model", 400),
    # without effect
    (ImageRequest(), {"sampler": "unipc", "eta": 0.5}, "eta", 400),
    (ImageRequest(), {"guidance_rescale": 0.5}, "guidance_rescale", 400),
    (ImageRequest(), {"sampler": "unipc", "eta": 0.0, "steps": 15}, "steps", 400),  # eta is right
    (EditRequest(resamples=3), {}, "resamples", 400),
    (EditRequest(method="repaint"), {}, "method", 400),
]


@pytest.mark.parametrize("request_, settings, param, status", WRONG)
def test_what_cannot_be_served_names_its_field(
    request_: ImageRequest,
    settings: dict[str, object],
    param: str,
    status: int,
    model: TrainedModel,
) -> None:
    with served({"digits": model}) as models:
        service = ImageService(models, ServiceSettings(requests=RequestLimits(max_steps=12)))
        image = () if type(request_) is ImageRequest else (png(PIXELS),)
        with pytest.raises(RequestError, match=r"\w") as refused:
            drawn(service, request_, *image, **{"steps": 4, **settings})
        assert (refused.value.param, refused.value.status) == (param, status)


@pytest.mark.parametrize("request_", [EditRequest(), VariationRequest()])
def test_an_image_smaller_than_the_models_is_refused(
    request_: ImageRequest, service: ImageService
) -> None:
    with pytest.raises(RequestError, match=r"image is 8 x 5 .*8 x 8"):
        drawn(service, request_, png(PIXELS[:5]), steps=4)


def test_too_much_work_is_refused_with_a_time(model: TrainedModel) -> None:
    with served({"digits": model}) as models:
        service = ImageService(models, ServiceSettings(max_queued_s=1e-6))
        drawn(service, ImageRequest(), steps=2).files("png", ENDS_S)
        held(model)
        running = drawn(service, ImageRequest(), steps=20)
        with pytest.raises(RequestError, match="try again in 1 s") as refused:
            drawn(service, ImageRequest(), steps=2)
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        assert refused.value.body()["error"]["type"] == "rate_limit_error"
        running.cancel()
        counted(model).go_on.set()
        with pytest.raises(JobCancelledError, match="the job was cancelled"):
            running.files("png", ENDS_S)


def test_a_short_job_passes_a_long_one(model: TrainedModel) -> None:
    """Each has the time that it takes alone as its allowance."""
    with served({"digits": model}, width=4) as models:
        service = ImageService(models)
        drawn(service, ImageRequest(), steps=20).files("png", ENDS_S)  # the rate is known then
        held(model)
        ends: list[str] = []
        long = drawn(service, ImageRequest(n=8), steps=20)
        assert counted(model).called.acquire(timeout=ENDS_S)
        short = drawn(service, ImageRequest(), steps=10)
        long.job.when_done(lambda: ends.append("long"))
        short.job.when_done(lambda: ends.append("short"))
        counted(model).go_on.set()
        long.files("png", ENDS_S)
        assert ends == ["short", "long"]


def test_a_job_that_takes_too_long_is_an_error(model: TrainedModel) -> None:
    """Also for an idle engine, which takes any other job."""
    with served({"digits": model}) as models:
        service = ImageService(models, ServiceSettings(max_job_s=1e-6))
        drawn(service, ImageRequest(), steps=2).files("png", ENDS_S)  # the rate is unknown before
        with pytest.raises(RequestError, match=r"takes about .* take fewer steps") as refused:
            drawn(service, ImageRequest(), steps=20)
        assert refused.value.status == 400


def test_a_job_that_a_client_cannot_pay_is_not_begun(
    service: ImageService, model: TrainedModel
) -> None:
    """Cost: 5 network calls of 2 images with guidance, of 8 x 8 pixels."""
    wanted = order(ImageRequest(n=2), steps=5, labels=[1], guidance_scale=2.0)
    megapixels = 5 * 2 * 2 * 64 / 1e6
    with pytest.raises(UnaffordableError, match=str(megapixels)):
        service.start(wanted, affordable=megapixels * 0.99)
    assert counted(model).batches == []
    _, accepted = service.start(replace(wanted), affordable=megapixels)
    assert accepted.cost == pytest.approx(megapixels)
