"""The job table: jobs that come back, are lost, left, paid for and forgotten."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.job_table import JobReport, JobTable, TableSettings
from ddpm_ray.serving.limits import TokenBucket
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    Unaffordable,
    WorkerLostError,
)
from ddpm_ray.serving.request_errors import RequestError
from tests.limits import ENDS_S

ACCEPTED = Accepted("model/3", {"seed": 1}, rows=10, cost=2.0)
PREVIEWS = [PreviewFiles(number, (b"p%d" % number,)) for number in range(3)]
FINISHED = Finished((b"image", b"other"))
WHOLE: list[Event] = [ACCEPTED, *PREVIEWS, FINISHED]
KEY = ("alice", "job")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scripted:
    """Draws by scripts, one for each time that it is asked; a script ends in what it raises."""

    def __init__(self, *scripts: Sequence[Event | Exception]) -> None:
        self.scripts = list(scripts)
        self.asked: list[tuple[ImageOrder, str, float]] = []
        self.closed = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(
        self, order: ImageOrder, source: str, affordable: float
    ) -> AsyncGenerator[Event, None]:
        self.asked.append((order, source, affordable))
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for event in script:
                await self.go_on.wait()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work(), ENDS_S)

    asyncio.run(bounded())


def order(seed: int = 1, image: bytes | None = None, **fields: Any) -> ImageOrder:
    return ImageOrder("generation", ImageRequest(**fields), {"seed": seed}, image)


async def ended(table: JobTable, key: tuple[str, str] = KEY) -> JobReport:
    while (found := await table.report(key, 0, ENDS_S)).state in ("queued", "running"):
        await asyncio.sleep(0)
    return found


def test_a_client_that_comes_back_reads_the_same_job() -> None:
    async def work() -> None:
        draw = Scripted(WHOLE)
        table = JobTable(draw)
        await table.submit(KEY, order(), is_kept=True)
        assert (await ended(table)).events == tuple(WHOLE)
        await table.submit(KEY, order(), is_kept=True)
        assert (await table.report(KEY, 3, 0.0)).events == tuple(WHOLE[3:])
        assert len(draw.asked) == 1
        with pytest.raises(RequestError, match="job job is there with other fields") as refused:
            await table.submit(KEY, order(seed=2), is_kept=True)
        assert refused.value.status == 409
        with pytest.raises(RequestError, match="there is no job job") as refused:
            await table.report(("bob", "job"), 0, 0.0)
        assert refused.value.status == 404

    run(work)


@given(losses=st.lists(st.integers(0, 4), max_size=4))
def test_the_events_of_a_job_do_not_depend_on_the_processes_that_are_lost(
    losses: list[int],
) -> None:
    """Each loss comes after some events; the job goes on with the weights that it began with."""

    async def work() -> None:
        lost = WorkerLostError("killed")
        draw = Scripted(*[[*WHOLE[:count], lost] for count in losses], WHOLE)
        table = JobTable(draw, TableSettings(max_losses=4, retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        assert (await ended(table)).events == tuple(WHOLE)
        began = [count > 0 for count in losses]
        sources = ["model/3" if any(began[:n]) else "" for n in range(len(losses) + 1)]
        assert [source for _, source, _ in draw.asked] == sources
        assert draw.closed == len(draw.asked)

    run(work)


def test_a_job_that_loses_every_process_is_given_up() -> None:
    async def work() -> None:
        draw = Scripted([WorkerLostError("killed by signal 9")])
        table = JobTable(draw, TableSettings(max_losses=2, retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        (failed,) = (await ended(table)).events
        assert isinstance(failed, Failed)
        assert "was lost 3 times (killed by signal 9)" in failed.error.message
        assert (failed.error.status, len(draw.asked)) == (500, 3)

    run(work)


def test_events_that_end_without_images_are_a_loss() -> None:
    async def work() -> None:
        table = JobTable(Scripted([ACCEPTED], WHOLE), TableSettings(retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        assert (await ended(table)).state == "succeeded"

    run(work)


def test_an_error_of_the_program_is_told_and_ends_the_job() -> None:
    async def work() -> None:
        table = JobTable(Scripted([ACCEPTED, ValueError("no such thing")]))
        await table.submit(KEY, order(), is_kept=True)
        failed = (await ended(table)).events[-1]
        assert isinstance(failed, Failed)
        assert failed.error.message == "the job has failed (ValueError: no such thing)"

    run(work)


@pytest.mark.parametrize("way", ["cancel", "leave", "sweep"])
def test_a_job_that_nobody_wants_ends_its_work(way: str) -> None:
    async def work() -> None:
        clock, draw = Clock(), Scripted(WHOLE)
        table = JobTable(draw, clock=clock)
        await table.submit(KEY, order(), is_kept=way == "cancel")
        draw.go_on.clear()
        while not draw.asked:
            await asyncio.sleep(0)
        if way == "sweep":
            clock.now_s = table.settings.lease_s - 1
            table.sweep()
            assert table.unfinished == 1
            clock.now_s += 2
            table.sweep()
        else:
            await getattr(table, way)(KEY)
        while not draw.closed:
            await asyncio.sleep(0)
        assert table.unfinished == 0
        if way == "cancel":
            assert (await table.report(KEY, 0, 0.0)).state == "cancelled"
            draw.go_on.set()
            await table.submit(KEY, order(), is_kept=True)  # a cancelled job may begin again
            assert (await ended(table)).state == "succeeded"

    run(work)


def test_a_kept_job_needs_no_reader() -> None:
    async def work() -> None:
        clock = Clock()
        table = JobTable(Scripted(WHOLE), clock=clock)
        await table.submit(KEY, order(), is_kept=True)
        await table.leave(KEY)
        clock.now_s = 1000.0
        table.sweep()
        assert (await ended(table)).state == "succeeded"
        clock.now_s += table.settings.kept_s + 1
        table.sweep()
        with pytest.raises(RequestError, match="there is no job job"):
            await table.report(KEY, 0, 0.0)

    run(work)


def test_images_by_url_outlive_their_answer_and_are_bounded() -> None:
    async def work() -> None:
        table = JobTable(Scripted(WHOLE), TableSettings(kept_bytes=10_000))
        keys = [("alice", f"job{n}") for n in range(10)]
        secrets = []
        for key in keys:
            await table.submit(key, order(response_format="url", output_format="webp"), False)
            secrets.append((await ended(table, key)).secret)
            await table.leave(key)
        assert table.file(secrets[-1], 1) == (b"other", "webp")
        for secret, index in ((secrets[0], 0), (secrets[-1], 2), ("x", 0)):
            with pytest.raises(RequestError, match="no such image; images are kept for at most 1"):
                table.file(secret, index)

    run(work)


def test_a_client_pays_for_a_job_once_and_waits_when_it_has_spent_too_much() -> None:
    async def work() -> None:
        clock = Clock()
        bucket = TokenBucket(per_s=1.0, burst=10.0, clock=clock)
        lost = WorkerLostError("killed")
        draw = Scripted([ACCEPTED, lost], WHOLE, [Unaffordable(9.0)], WHOLE)
        table = JobTable(draw, TableSettings(retry_s=0), {"alice": bucket}, clock)
        await table.submit(KEY, order(), is_kept=True)
        assert (await ended(table)).state == "succeeded"
        assert [affordable for *_, affordable in draw.asked] == [float("inf")] * 2
        assert bucket.affordable == pytest.approx(8.0)
        await table.submit(("alice", "second"), order(), is_kept=True)
        failed = (await ended(table, ("alice", "second"))).events[-1]
        assert isinstance(failed, Failed)
        assert draw.asked[-1][2] == pytest.approx(8.0)
        assert failed.error.status == 429
        assert failed.error.headers == {"Retry-After": "1"}
        assert bucket.affordable == pytest.approx(8.0)
        clock.now_s += 1.0
        await table.submit(("alice", "second"), order(), is_kept=True)
        assert (await ended(table, ("alice", "second"))).state == "succeeded"
        text = table.metrics.text()
        assert 'ended_jobs_total{kind="generation",state="refused"} 1.0' in text
        assert "ddpm_ray_restarted_jobs_total 1.0" in text

    run(work)


@pytest.mark.parametrize(
    "settings, image, problem",
    [
        (TableSettings(max_jobs=1), None, r"1 job with 0\.0 MB of images are open"),
        (TableSettings(max_uploads=15), b"0123456789", r"1 job with 0\.0 MB of images are open"),
    ],
)
def test_open_jobs_and_their_uploads_are_bounded(
    settings: TableSettings, image: bytes | None, problem: str
) -> None:
    async def work() -> None:
        draw = Scripted(WHOLE)
        draw.go_on.clear()
        table = JobTable(draw, settings)
        await table.submit(KEY, order(image=image), is_kept=True)
        with pytest.raises(RequestError, match=problem) as refused:
            await table.submit(("bob", "job"), order(image=image), is_kept=True)
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "5")
        draw.go_on.set()
        await ended(table)
        await table.submit(("bob", "job"), order(image=image), is_kept=True)

    run(work)


def test_a_table_that_drains_takes_no_job_and_ends_with_those_that_run() -> None:
    async def work() -> None:
        draw = Scripted([ACCEPTED, JobProgress(0, 1.0, 5), FINISHED])
        draw.go_on.clear()
        table = JobTable(draw)
        await table.submit(KEY, order(), is_kept=True)
        assert await table.drain(0.01) == 1
        with pytest.raises(RequestError, match="shutting down") as refused:
            await table.submit(("bob", "job"), order(), is_kept=True)
        assert refused.value.status == 503
        await table.submit(KEY, order(), is_kept=True)  # it is there
        draw.go_on.set()
        assert await table.drain(ENDS_S) == 0
        assert (await ended(table)).progress == JobProgress(0, 1.0, 5)

    run(work)
