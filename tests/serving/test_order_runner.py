"""Orders in a replica: their events, and work that nobody waits for any longer."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving import shared_calls
from ddpm_ray.serving.engine_task import JobCancelledError
from ddpm_ray.serving.image_jobs import ImageJob
from ddpm_ray.serving.image_requests import EditRequest, ImageRequest
from ddpm_ray.serving.image_service import ImageService, ServiceSettings
from ddpm_ray.serving.order_runner import OrderRunner
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    ReplicaLostError,
)
from ddpm_ray.serving.served_models import ServedModels
from tests.limits import ENDS_S
from tests.serving.counted_model import counted, held
from tests.serving.in_loop import released, run
from tests.serving.local_server import served
from tests.serving.test_image_service import PIXELS, png

ANY = float("inf")


@pytest.fixture
def models(model: TrainedModel) -> Iterator[ServedModels]:
    with served({"digits": model}) as made:
        yield made


def order(steps: int = 5, **fields: Any) -> ImageOrder:
    return ImageOrder("generation", ImageRequest(**fields), {"seed": 1, "steps": steps})


def edit(steps: int = 5) -> ImageOrder:
    request = EditRequest(strength=1.0)
    return ImageOrder("edit", request, {"seed": 1, "steps": steps}, png(PIXELS))


async def events(runner: OrderRunner, one: ImageOrder, source: str = "") -> list[Event]:
    return [event async for event in runner.draw(one, source, ANY, "table")]


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a job has been cancelled."""
    found, cancel = threading.Event(), ImageJob.cancel

    def noted(job: ImageJob) -> None:
        cancel(job)
        found.set()

    monkeypatch.setattr(ImageJob, "cancel", noted)
    return found


@pytest.mark.parametrize("steps, previews", [(9, 3), (2, 2), (1, 1)])
def test_events_come_in_order(models: ServedModels, steps: int, previews: int) -> None:
    """A job has no more previews than steps, numbered from 0."""

    async def work() -> None:
        made = await events(OrderRunner(ImageService(models)), order(steps, partial_images=3, n=2))
        others = [event for event in made if not isinstance(event, JobProgress)]
        assert [type(event) for event in others] == [Accepted, *[PreviewFiles] * previews, Finished]
        numbers = [event.number for event in others if isinstance(event, PreviewFiles)]
        assert numbers == list(range(previews))
        first, last = made[0], made[-1]
        assert isinstance(first, Accepted)  # that it has begun, and how long it is
        assert (first.progress.place, first.progress.rows) == (0, 2 * steps)
        assert isinstance(last, Finished)
        assert last.computed == 2 * steps

    run(work)


def test_a_job_that_nobody_waits_for_when_it_begins_is_cancelled(
    models: ServedModels,
    model: TrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    cancelled: threading.Event,
) -> None:
    """The client leaves while its upload is read, in another thread."""
    reads, go_on = threading.Event(), threading.Event()
    service, made = ImageService(models), list[ImageJob]()
    start = service.start

    def slow(*given: Any) -> tuple[ImageJob, Accepted]:
        reads.set()
        assert go_on.wait(ENDS_S)
        job, accepted = start(*given)
        made.append(job)
        return job, accepted

    monkeypatch.setattr(service, "start", slow)
    held(model)

    async def work() -> None:
        asking = asyncio.ensure_future(events(OrderRunner(service), edit(20)))
        await released(reads)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        go_on.set()
        await released(cancelled)
        counted(model).go_on.set()
        with pytest.raises(JobCancelledError, match="the job was cancelled"):
            await asyncio.to_thread(made[0].files, "png", ENDS_S)
        assert len(counted(model).batches) <= 1

    run(work)


def test_the_orders_of_a_lost_table_are_given_up(
    models: ServedModels, model: TrainedModel, cancelled: threading.Event
) -> None:
    """It cannot close their generators; the first order of its successor does."""
    held(model)

    async def work() -> None:
        runner = OrderRunner(ImageService(models))
        old = runner.draw(order(20), "", ANY, "old")
        assert isinstance(await anext(old), Accepted)
        await released(counted(model).called)
        rest = asyncio.ensure_future(events(runner, order(2)))
        await released(cancelled)
        counted(model).go_on.set()
        assert isinstance((await rest)[-1], Finished)
        await old.aclose()
        assert len([steps for steps in counted(model).batches if len(steps) == 1]) <= 3

    run(work)


def test_an_accepted_job_finds_room_in_a_busy_replica(
    models: ServedModels, model: TrainedModel
) -> None:
    """Its own was lost; a new job is refused."""
    service = ImageService(models, ServiceSettings(max_queued_s=1e-6))

    async def work() -> None:
        runner = OrderRunner(service)
        await events(runner, order(2))  # the rate is known then
        held(model)
        running = asyncio.ensure_future(events(runner, order(20)))
        await released(counted(model).called)
        (refused,) = await events(runner, order(2))
        assert isinstance(refused, Failed)
        assert refused.error.status == 429
        moved = runner.draw(order(2), "digits", ANY, "table")
        assert isinstance(await anext(moved), Accepted)
        counted(model).go_on.set()
        assert isinstance([event async for event in moved][-1], Finished)
        assert isinstance((await running)[-1], Finished)

    run(work)


def test_a_network_that_exits_ends_its_job(models: ServedModels, model: TrainedModel) -> None:
    counted(model).exits = True

    async def work() -> None:
        failed = (await events(OrderRunner(ImageService(models)), order()))[-1]
        assert isinstance(failed, Failed)
        assert failed.error.status == 500
        assert "ends its thread" not in failed.error.message

    run(work)


def test_the_jobs_of_a_broken_gpu_run_elsewhere(
    models: ServedModels, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All later calls fail at once, so the others would be sent here, and fail."""

    def broken(*_: Any) -> None:
        raise RuntimeError(f"{shared_calls.CUDA_ERROR}: an illegal memory access")

    monkeypatch.setattr(counted(model), "forward", broken)

    async def work() -> None:
        with pytest.raises(ReplicaLostError, match=r"engine has failed .*illegal memory access"):
            await events(OrderRunner(ImageService(models)), order())
        assert "illegal memory access" in models.current[0].engine.fault

    run(work)
