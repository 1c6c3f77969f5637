"""Models of a server: names that move in the registry, and jobs that end as they began."""

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.image_service import ImageService
from ddpm_ray.serving.orders import ImageOrder
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.served_models import LoadedModel, ServedModels
from tests.limits import ENDS_S
from tests.serving.counted_model import counted, held, tiny_model
from tests.serving.local_server import Loaded
from tests.serving.test_image_service import opened

ORDER = ImageOrder("generation", ImageRequest(), {"seed": 3, "steps": 5})
NAME = "models:/faces@champion"


def other_model() -> TrainedModel:
    """A model with other weights."""
    model = tiny_model()
    network = counted(model).network
    nn.init.normal_(network.conv_out.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return model


def loader(**models: TrainedModel) -> Loaded:
    """A registry in which NAME means `one`."""
    found = Loaded(models)
    found.moves[NAME] = "one"
    return found


def image(job: object) -> np.ndarray:
    return opened(job.files("png", ENDS_S)[0])  # type: ignore[attr-defined]


def near(found: np.ndarray, model: TrainedModel) -> bool:
    wanted = model.sample(1, seed=3, steps=5)[0, ..., 0]
    return bool(np.abs(found.astype(int) - wanted).max() <= 1)


def test_new_jobs_get_the_moved_model_and_running_ones_end_on_theirs() -> None:
    one, two = tiny_model(), other_model()
    registry = loader(one=one, two=two)
    with ServedModels({"faces": NAME}, registry) as models:
        service = ImageService(models)
        held(one)
        running, accepted = service.start(ORDER)
        assert accepted.source == "one"
        assert counted(one).called.acquire(timeout=ENDS_S)
        registry.moves[NAME] = "two"
        assert models.refresh() == ["faces"]
        assert models.refresh() == []
        new, accepted = service.start(ORDER)
        assert accepted.source == "two"
        counted(one).go_on.set()
        assert near(image(running), one)
        assert near(image(new), two)
        again, accepted = service.start(ORDER, "one")  # a job whose process was lost
        assert accepted.source == "one"
        assert near(image(again), one)


def test_a_process_that_never_had_a_version_loads_it_for_a_lost_job() -> None:
    one, two = tiny_model(), other_model()
    registry = loader(one=one, two=two)
    registry.moves[NAME] = "two"
    with ServedModels({"faces": NAME}, registry) as models:
        job, accepted = ImageService(models).start(ORDER, "one")
        assert accepted.source == "one"
        assert near(image(job), one)
        assert [model.source for model in models.current] == ["two"]


@pytest.mark.parametrize("fault", ["registry", "model"])
def test_a_dead_registry_or_a_bad_model_changes_nothing(
    fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tiny_model()
    registry = loader(one=one)

    def unreachable(uri: str) -> str:
        raise ConnectionError(f"{uri}:\nno answer")

    with ServedModels({"faces": NAME}, registry) as models:
        registry.moves[NAME] = "gone"  # there is no such model
        if fault == "registry":
            monkeypatch.setattr(registry, "source", unreachable)
        with caplog.at_level(logging.WARNING):
            assert models.refresh() == []
        reason = f"{NAME}: no answer" if fault == "registry" else "'gone'"
        assert caplog.messages == [f"faces: one stays in use: {reason}"]
        assert near(image(ImageService(models).start(ORDER)[0]), one)


def test_a_model_is_warm_before_it_is_served() -> None:
    warmed: list[str] = []

    def warm(served: LoadedModel) -> None:
        served.engine.submit(lambda: served.model.sample(1, steps=2), images=1, cost=2).result()
        warmed.append(served.source)

    registry = loader(one=tiny_model(), two=tiny_model())
    with ServedModels({"faces": NAME}, registry, warm=warm) as models:
        assert models.current[0].engine.load[1] > 0  # the rate is known
        registry.moves[NAME] = "two"
        models.refresh()
        assert warmed == ["one", "two"]


def test_a_model_that_cannot_be_loaded_leaves_no_thread() -> None:
    with pytest.raises(KeyError, match="gone"):
        ServedModels({"faces": "gone"}, loader())
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
    with pytest.raises(ValueError, match="models is empty; a server serves at least one"):
        ServedModels({}, loader())


def test_an_unknown_model_is_named_with_those_that_are_there() -> None:
    with ServedModels({"faces": NAME, "digits": "one"}, loader(one=tiny_model())) as models:
        wanted = replace(ORDER, request=ImageRequest(model="cats"))
        with pytest.raises(RequestError, match="no model 'cats'; there are faces, digits"):
            ImageService(models).start(wanted)
        assert [facts["id"] for facts in (one.facts for one in models.current)] == [
            "faces",
            "digits",
        ]
