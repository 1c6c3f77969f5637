"""The job table: jobs that come back, are lost, left, paid for and forgotten."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.serving.image_requests import ImageRequest
from ddpm_ray.serving.job_entry import JobKey, JobReport, Wait
from ddpm_ray.serving.job_table import JobTable
from ddpm_ray.serving.kept_jobs import RESENT_S
from ddpm_ray.serving.limits import TokenBucket
from ddpm_ray.serving.orders import (
    Accepted,
    Event,
    Failed,
    Finished,
    ImageOrder,
    JobProgress,
    PreviewFiles,
    ReplicaLostError,
    Unaffordable,
)
from ddpm_ray.serving.request_errors import RequestError
from ddpm_ray.serving.table_settings import TableSettings
from tests.limits import ENDS_S
from tests.serving.in_loop import run

BEGUN = JobProgress(0, None, 0, 10)
ACCEPTED = Accepted("model/3", {"seed": 1}, cost=2.0, progress=BEGUN)
PREVIEWS = [PreviewFiles(number, (b"p%d" % number,)) for number in range(3)]
FINISHED = Finished((b"image", b"other"), computed=10)
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
        self.go_on, self.begun, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.go_on.set()

    async def __call__(
        self, order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event, None]:
        self.asked.append((order, source, affordable))
        self.begun.set()
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for event in script:
                await self.go_on.wait()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1
            self.ended.set()


def order(seed: int = 1, image: bytes | None = None, **fields: Any) -> ImageOrder:
    return ImageOrder("generation", ImageRequest(**fields), {"seed": seed}, image)


async def ended(table: JobTable, key: JobKey = KEY) -> JobReport:
    return await table.report(key, 0, ENDS_S, until_end=True)


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
        lost = ReplicaLostError("killed")
        draw = Scripted(*[[*WHOLE[:count], lost] for count in losses], WHOLE)
        table = JobTable(draw, TableSettings(max_losses=4, retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        report = await ended(table)
        assert (report.events, report.progress.losses) == (tuple(WHOLE), len(losses))
        began = [count > 0 for count in losses]
        sources = ["model/3" if any(began[:n]) else "" for n in range(len(losses) + 1)]
        assert [source for _, source, _ in draw.asked] == sources
        assert draw.closed == len(draw.asked)

    run(work)


def test_a_job_that_loses_every_process_is_given_up() -> None:
    async def work() -> None:
        draw = Scripted([ReplicaLostError("killed by signal 9")])
        table = JobTable(draw, TableSettings(max_losses=2, retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        (failed,) = (await ended(table)).events
        assert isinstance(failed, Failed)
        assert failed.error.message == "the process that ran the job was lost 3 times"
        assert (failed.error.status, len(draw.asked)) == (500, 3)

    run(work)


def test_events_that_end_without_images_are_a_loss() -> None:
    async def work() -> None:
        table = JobTable(Scripted([ACCEPTED], WHOLE), TableSettings(retry_s=0))
        await table.submit(KEY, order(), is_kept=True)
        assert (await ended(table)).state == "succeeded"

    run(work)


def test_an_error_of_the_program_ends_the_job_with_a_reference_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        table = JobTable(Scripted([ACCEPTED, ValueError("no such thing")]))
        await table.submit(KEY, order(), is_kept=True)
        failed = (await ended(table)).events[-1]
        assert isinstance(failed, Failed)
        message = failed.error.message
        assert "no such thing" not in message  # it may show paths and addresses
        assert message.removesuffix(")").rpartition(" ")[2] in caplog.text
        assert "no such thing" in caplog.text

    run(work)


@pytest.mark.parametrize("way", ["cancel", "leave", "sweep"])
def test_a_job_that_nobody_wants_ends_its_work(way: str) -> None:
    async def work() -> None:
        clock, draw = Clock(), Scripted(WHOLE)
        table = JobTable(draw, clock=clock)
        draw.go_on.clear()
        await table.submit(KEY, order(), is_kept=way == "cancel")
        await draw.begun.wait()
        if way == "sweep":
            clock.now_s = table.settings.lease_s - 1
            table.sweep()
            assert table.unfinished == 1
            clock.now_s += 2
            table.sweep()
        else:
            await getattr(table, way)(KEY)
        await draw.ended.wait()
        assert table.unfinished == 0
        if way == "cancel":
            assert (await table.report(KEY, 0, 0.0)).state == "cancelled"
            draw.go_on.set()
            await table.submit(KEY, order(), is_kept=True)  # a cancelled job may begin again
            assert (await ended(table)).state == "succeeded"
            clock.now_s += table.settings.lease_s + 1
            table.sweep()  # that of the cancelled one is over
            assert (await table.report(KEY, 0, 0.0)).state == "succeeded"

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


def test_a_job_that_nobody_can_come_back_to_is_forgotten_after_its_answer() -> None:
    async def work() -> None:
        clock = Clock()
        table = JobTable(Scripted(WHOLE), clock=clock)
        kept = ("alice", "kept")
        for key in (KEY, kept):
            submitted = await table.submit(key, order(), key is kept, "", Wait(ENDS_S, True))
            assert submitted.report.state == "succeeded"  # with one message
        table.sweep()
        assert (await table.report(KEY, 0, 0.0)).state == "succeeded"  # asked again: it was lost
        clock.now_s = RESENT_S + 1
        table.sweep()
        with pytest.raises(RequestError, match="there is no job job"):
            await table.report(KEY, 0, 0.0)
        assert (await table.report(kept, 0, 0.0)).state == "succeeded"

    run(work)


def test_images_by_url_outlive_their_answer_and_are_bounded() -> None:
    async def work() -> None:
        clock = Clock()
        table = JobTable(Scripted(WHOLE), TableSettings(kept_bytes=10_000), clock=clock)
        keys = [("alice", f"job{n}") for n in range(10)]
        secrets = []
        for key in keys:
            await table.submit(key, order(response_format="url", output_format="webp"), False)
            secrets.append((await ended(table, key)).secret)
            await table.leave(key)
            clock.now_s += 1
        table.sweep()
        assert await table.file(secrets[0], "0.webp")  # its client may read it now
        clock.now_s += table.settings.lease_s
        table.sweep()
        assert await table.file(secrets[-1], "1.webp") == b"other"
        wrong = (secrets[0], "0.webp"), (secrets[-1], "2.webp"), (secrets[-1], "1.png"), ("x", "")
        for secret, name in wrong:
            with pytest.raises(RequestError, match="no such image; images are kept for at most 1"):
                await table.file(secret, name)

    run(work)


def test_a_client_pays_for_a_job_once_and_waits_when_it_has_spent_too_much() -> None:
    async def work() -> None:
        clock = Clock()
        bucket = TokenBucket(per_s=1.0, burst=10.0, clock=clock)
        lost = ReplicaLostError("killed")
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
        (TableSettings(max_jobs=1), None, r"1 job with 0\.0 MB of uploads are open"),
        (TableSettings(max_uploads=15), b"0123456789", r"1 job with 0\.0 MB of uploads are open"),
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


def test_one_job_that_kills_its_replica_fails_alone() -> None:
    """All jobs of a replica are lost with it; a suspected one runs alone until it is done."""
    arrivals: asyncio.Queue[tuple[int, asyncio.Future[Event]]] = asyncio.Queue()
    kills: list[bool] = []

    async def draw(
        order: ImageOrder, source: str, affordable: float, table: str
    ) -> AsyncGenerator[Event, None]:
        yield ACCEPTED
        outcome: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        arrivals.put_nowait((order.settings["seed"], outcome))
        yield await outcome

    async def replica(table: JobTable) -> None:
        """Take all jobs that come; order 0 kills it, and all that are in it are lost."""
        while True:
            taken = [await arrivals.get()]
            while not table._alone.locked() and len(taken) < table.unfinished:
                taken.append(await arrivals.get())
            kills.append(0 in dict(taken))
            for _, outcome in taken:
                if kills[-1]:
                    outcome.set_exception(ReplicaLostError("killed"))
                else:
                    outcome.set_result(FINISHED)

    async def work() -> None:
        table = JobTable(draw, TableSettings(retry_s=0))
        keys = [("alice", str(seed)) for seed in range(6)]
        for seed, key in enumerate(keys):
            await table.submit(key, order(seed), is_kept=True)
        running = asyncio.create_task(replica(table))
        states = [(await ended(table, key)).state for key in keys]
        assert states == ["failed", *["succeeded"] * 5]
        assert sum(kills) == 6  # docs/serving.md
        running.cancel()

    run(work)


def test_jobs_at_once_spend_no_more_than_one_after_the_other() -> None:
    """Each knows what is affordable before another is charged, if they are not kept apart."""

    async def work() -> None:
        bucket = TokenBucket(per_s=1e-9, burst=10.0, clock=Clock())
        asked, decides = list[ImageOrder](), asyncio.Event()

        async def draw(
            order: ImageOrder, source: str, affordable: float, table: str
        ) -> AsyncGenerator[Event, None]:
            asked.append(order)
            await decides.wait()
            if affordable < 4.0:
                yield Unaffordable(4.0)
                return
            yield Accepted("model", {}, cost=4.0, progress=BEGUN)
            yield FINISHED

        table = JobTable(draw, buckets={"alice": bucket})
        keys = [("alice", str(number)) for number in range(9)]
        for key in keys:
            await table.submit(key, order(), is_kept=True)
        await table.report(keys[-1], 0, 0.01)  # all have their turn
        assert len(asked) == 1
        decides.set()
        states = [(await ended(table, key)).state for key in keys]
        assert states.count("succeeded") == 2

    run(work)


def test_a_job_of_a_lost_table_goes_on_with_its_weights_and_is_not_paid_twice() -> None:
    async def work() -> None:
        bucket = TokenBucket(per_s=1e-9, burst=10.0, clock=Clock())
        draw = Scripted(WHOLE)
        table = JobTable(draw, buckets={"alice": bucket})
        await table.submit(KEY, order(), is_kept=True, source="model/2")
        await ended(table)
        assert draw.asked[0][1:] == ("model/2", float("inf"))
        assert bucket.affordable == float("inf")

    run(work)


def test_a_client_that_leaves_pays_for_what_was_computed() -> None:
    async def work() -> None:
        bucket = TokenBucket(per_s=1e-9, burst=10.0, clock=Clock())
        computing = asyncio.Event()

        async def draw(
            order: ImageOrder, source: str, affordable: float, table: str
        ) -> AsyncGenerator[Event, None]:
            yield ACCEPTED
            yield JobProgress(0, 1.0, 4, 10)
            computing.set()
            await asyncio.Event().wait()  # to be cancelled

        table = JobTable(draw, buckets={"alice": bucket})
        await table.submit(KEY, order(), is_kept=False)
        await computing.wait()
        assert bucket.affordable == pytest.approx(10 - 2.0)
        await table.leave(KEY)
        assert bucket.affordable == pytest.approx(10 - 2.0 * 4 / 10)

    run(work)


def test_the_fields_of_the_answer_are_not_those_of_the_job() -> None:
    async def work() -> None:
        draw = Scripted(WHOLE)
        table = JobTable(draw)
        await table.submit(KEY, order(), is_kept=True)
        await table.submit(KEY, order(stream=True, user="me", response_format="url"), is_kept=True)
        with pytest.raises(RequestError, match="there with other fields"):
            await table.submit(KEY, order(output_format="webp"), is_kept=True)
        await ended(table)
        assert len(draw.asked) == 1

    run(work)


def test_many_jobs_that_have_ended_cost_a_submission_nothing() -> None:
    """Failed ones are forgotten after the lease; the table holds no more than those."""

    async def work() -> None:
        clock = Clock()
        refused = Failed(RequestError("too much", status=429))
        table = JobTable(Scripted([refused]), clock=clock)
        for number in range(300):
            clock.now_s += 1
            key = ("alice", str(number))
            await table.submit(key, order(), is_kept=True)
            assert (await ended(table, key)).state == "failed"
            table.sweep()
        with pytest.raises(RequestError, match="there is no job 200"):
            await table.report(("alice", "200"), 0, 0.0)
        assert (await table.report(("alice", "290"), 0, 0.0)).state == "failed"

    run(work)


def test_a_table_that_drains_takes_no_job_and_ends_with_those_that_run() -> None:
    async def work() -> None:
        draw = Scripted([ACCEPTED, JobProgress(0, 1.0, 5, 10), FINISHED])
        draw.go_on.clear()
        table = JobTable(draw)
        await table.submit(KEY, order(), is_kept=True)
        await draw.begun.wait()
        draining = asyncio.create_task(table.drain(ENDS_S))
        await table.report(KEY, 0, 0.01)  # lets it begin
        assert table.is_draining
        with pytest.raises(RequestError, match="shutting down") as refused:
            await table.submit(("bob", "job"), order(), is_kept=True)
        assert refused.value.status == 503
        await table.submit(KEY, order(), is_kept=True)  # it is there
        draw.go_on.set()
        assert await draining == 0
        assert (await ended(table)).progress == JobProgress(0, 0.0, 10, 10)

    run(work)


def test_a_table_that_drains_too_long_cuts_jobs_off() -> None:
    async def work() -> None:
        draw = Scripted(WHOLE)
        draw.go_on.clear()
        table = JobTable(draw)
        await table.submit(KEY, order(), is_kept=True)
        assert await table.drain(0.01) == 1
        (failed,) = (await ended(table)).events
        assert isinstance(failed, Failed)
        assert failed.error.status == 503
        await draw.ended.wait()

    run(work)
