"""The engine: same images whoever shares a batch, jobs that come, go and fail between two steps."""

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.serving import engine as engine_module
from ddpm_ray.serving.engine import Engine
from ddpm_ray.serving.engine_settings import EngineSettings
from ddpm_ray.serving.engine_task import EngineJob, JobCancelledError
from tests.limits import ENDS_S
from tests.sampling.test_cascade import cascade
from tests.serving.counted_model import counted, held

KNOWN = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
MASK = np.arange(64).reshape(8, 8) % 3 > 0
Act = Callable[[TrainedModel], Images]
JOBS: dict[str, Act] = {  # each is one job, at other steps, labels, guidance and methods
    "ddim": lambda m: m.sample(2, steps=7, seed=1),
    "ancestral, guided": lambda m: m.sample(
        1, steps=5, seed=2, sampler="ancestral", labels=[1], guidance_scale=3.0
    ),
    "dpm_solver_pp": lambda m: m.sample(1, steps=4, seed=3, sampler="dpm_solver_pp", first=5),
    "dpm_solver_pp_sde": lambda m: m.sample(1, steps=4, seed=3, sampler="dpm_solver_pp_sde"),
    "unipc": lambda m: m.sample(3, steps=6, seed=4, sampler="unipc", labels=[0, 2]),
    "heun": lambda m: m.sample(1, steps=4, seed=5, sampler="heun"),
    "plms": lambda m: m.sample(1, steps=8, seed=6, sampler="plms", guidance_scale=2.0),
    "repaint": lambda m: m.inpaint(KNOWN, MASK, steps=4, method="repaint", resamples=2, seed=7),
    "replacement": lambda m: m.inpaint(KNOWN, MASK, steps=5, method="replacement", seed=8),
    "outpaint": lambda m: m.outpaint(KNOWN, left=3, bottom=2, steps=4, method="replacement"),
    "image to image": lambda m: m.image_to_image(KNOWN, 0.6, steps=6, seed=9),
}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(EngineSettings(width=8)) as made:
        yield made


def submitted(engine: Engine, model: TrainedModel, act: Act, **how: Any) -> EngineJob[Images]:
    own = engine.shared(model)
    return engine.submit(lambda: act(own), **{"images": 1, "cost": 10, **how})


def wait_for_messages(engine: Engine, count: int) -> None:
    """Wait until so many have come while the network is held; a new job's first call is two."""
    ends_s = time.monotonic() + ENDS_S
    while len(engine._turns._inbox) < count:
        assert time.monotonic() < ends_s
        threading.Event().wait(0.001)


def test_jobs_of_all_kinds_at_once_give_the_images_of_each_alone(
    engine: Engine, model: TrainedModel
) -> None:
    """To one grey level: a convolution sums in another order for another batch."""
    alone = {name: act(model) for name, act in JOBS.items()}
    counted(model).batches.clear()
    jobs = {name: submitted(engine, model, act) for name, act in JOBS.items()}
    for name, job in jobs.items():
        found = job.result(ENDS_S).astype(int)
        assert found.shape == alone[name].shape
        assert np.abs(found - alone[name]).max() <= 1, name
    assert any(len(set(batch)) > 2 for batch in counted(model).batches), "no batch was mixed"


def test_with_exact_batches_the_bits_do_not_depend_on_other_jobs(model: TrainedModel) -> None:
    with Engine(EngineSettings(width=8, exact=True)) as engine:
        alone = {n: submitted(engine, model, act).result(ENDS_S) for n, act in JOBS.items()}
        jobs = {name: submitted(engine, model, act) for name, act in JOBS.items()}
        for name, job in jobs.items():
            assert np.array_equal(job.result(ENDS_S), alone[name]), name
        assert {len(batch) for batch in counted(model).batches} == {8}


def test_a_short_job_joins_and_leaves_while_a_long_one_runs(
    engine: Engine, model: TrainedModel
) -> None:
    held(model)
    long = submitted(engine, model, lambda m: m.sample(1, steps=20, seed=1))
    assert counted(model).called.acquire(timeout=ENDS_S)
    short = submitted(engine, model, lambda m: m.sample(1, steps=2, sampler="dpm_solver_pp"))
    seen: list[int] = []
    short.when_done(lambda: seen.append(long.computed))
    wait_for_messages(engine, 2)
    counted(model).go_on.set()
    short.result(ENDS_S)
    long.result(ENDS_S)
    assert seen[0] < 20
    assert sum(map(len, counted(model).batches)) == 22


def test_a_cancelled_job_computes_at_most_the_step_that_runs(
    engine: Engine, model: TrainedModel
) -> None:
    held(model)
    job = submitted(engine, model, lambda m: m.sample(1, steps=20))
    assert counted(model).called.acquire(timeout=ENDS_S)
    job.cancel()
    counted(model).go_on.set()
    with pytest.raises(JobCancelledError, match="the job was cancelled"):
        job.result(ENDS_S)
    assert job.computed == 1
    assert len(counted(model).batches) == 1


def test_what_is_cancelled_in_the_queue_never_begins(model: TrainedModel) -> None:
    with Engine(EngineSettings(max_images=1)) as engine:
        held(model)
        first = submitted(engine, model, lambda m: m.sample(1, steps=2))
        assert counted(model).called.acquire(timeout=ENDS_S)
        waiting = [submitted(engine, model, lambda m: m.sample(1, steps=2)) for _ in range(3)]
        assert [job.place for job in (first, *waiting)] == [0, 1, 2, 3]
        waiting[0].cancel()
        assert [job.place for job in waiting] == [0, 1, 2]
        counted(model).go_on.set()
        with pytest.raises(JobCancelledError, match="before it began"):
            waiting[0].result(ENDS_S)
        for job in (first, *waiting[1:]):
            job.result(ENDS_S)
        assert sum(map(len, counted(model).batches)) == 6


def test_a_short_job_passes_a_long_one_that_fills_all_batches(model: TrainedModel) -> None:
    """With the time that each takes alone as its allowance, as the service gives it."""
    with Engine(EngineSettings(width=4)) as engine:
        held(model)
        ends: list[str] = []
        jobs = []
        for name, images, steps in (("long", 8, 20), ("short", 1, 2)):
            act = partial(TrainedModel.sample, num_images=images, steps=steps)
            size = {"images": images, "cost": images * steps, "allowance_s": images * steps * 0.1}
            job = submitted(engine, model, act, **size)
            job.when_done(partial(ends.append, name))
            jobs.append(job)
            if name == "long":
                assert counted(model).called.acquire(timeout=ENDS_S)
        wait_for_messages(engine, 2)
        counted(model).go_on.set()
        for job in jobs:
            job.result(ENDS_S)
        assert ends == ["short", "long"]


def test_the_earliest_deadline_comes_first(model: TrainedModel) -> None:
    with Engine(EngineSettings(width=1, max_images=1)) as engine:
        held(model)
        ended = []
        first = submitted(engine, model, lambda m: m.sample(1, steps=1))
        assert counted(model).called.acquire(timeout=ENDS_S)
        for name, allowance_s in (("patient", 500.0), ("usual", 60.0), ("hasty", 1.0)):
            job = submitted(engine, model, lambda m: m.sample(1, steps=1), allowance_s=allowance_s)
            job.when_done(lambda name=name: ended.append(name))  # type: ignore[misc]
        counted(model).go_on.set()
        first.result(ENDS_S)
        job.result(ENDS_S)
        engine.submit(lambda: None, images=1, cost=0, allowance_s=1e4).result(ENDS_S)
    assert ended == ["hasty", "usual", "patient"]


def test_the_first_call_of_a_job_goes_before_later_calls_of_others(model: TrainedModel) -> None:
    """So a preview is there after one call, however many jobs with earlier deadlines run."""
    seen, gate = list[str](), threading.Event()

    def early(*_: object) -> None:
        seen.append("early")
        assert gate.wait(ENDS_S)

    with Engine(EngineSettings(width=1)) as engine:
        first = submitted(engine, model, lambda m: m.sample(1, steps=3, on_step=early))
        assert counted(model).called.acquire(timeout=ENDS_S)
        held(model)
        other = submitted(engine, model, lambda m: m.sample(1, steps=1))
        assert counted(model).called.acquire(timeout=ENDS_S)
        gate.set()
        wait_for_messages(engine, 1)
        late = submitted(
            engine,
            model,
            lambda m: m.sample(1, steps=2, on_step=lambda *_: seen.append("late")),
            allowance_s=1e4,
        )
        wait_for_messages(engine, 3)
        counted(model).go_on.set()
        for job in (first, other, late):
            job.result(ENDS_S)
    assert seen[:2] == ["early", "late"]


def test_an_error_of_one_job_reaches_that_job_alone(engine: Engine, model: TrainedModel) -> None:
    """The batch of both fails; each call is then computed alone."""
    good_alone = model.sample(1, steps=6, labels=[1])
    counted(model).fails_with = 2
    held(model)
    first = submitted(engine, model, lambda m: m.sample(1, steps=1, labels=[0]))
    assert counted(model).called.acquire(timeout=ENDS_S)
    good = submitted(engine, model, lambda m: m.sample(1, steps=6, labels=[1]))
    bad = submitted(engine, model, lambda m: m.sample(1, steps=6, labels=[2]))
    wait_for_messages(engine, 4)
    counted(model).go_on.set()
    first.result(ENDS_S)
    with pytest.raises(ValueError, match="fails with label 2"):
        bad.result(ENDS_S)
    assert any(len(batch) == 2 for batch in counted(model).batches), "they shared no batch"
    assert np.abs(good.result(ENDS_S).astype(int) - good_alone).max() <= 1


def test_a_closed_engine_ends_its_jobs_and_takes_no_more(model: TrainedModel) -> None:
    engine = Engine(EngineSettings(max_images=1))
    held(model)
    jobs = [submitted(engine, model, lambda m: m.sample(1, steps=20)) for _ in range(2)]
    assert counted(model).called.acquire(timeout=ENDS_S)
    counted(model).go_on.set()
    engine.close()
    for job in jobs:
        with pytest.raises(JobCancelledError, match="the engine was closed"):
            job.result(ENDS_S)
    with pytest.raises(RuntimeError, match="the engine was closed; make a new one"):
        engine.submit(lambda: None, images=1, cost=0)


def test_time_left_follows_from_the_costs_and_the_rate(model: TrainedModel) -> None:
    with Engine(EngineSettings(max_images=1)) as engine:
        assert engine.load == (0, 0.0)
        done = submitted(engine, model, lambda m: m.sample(1, steps=4), cost=4)
        done.result(ENDS_S)
        rate = engine.load[1]
        assert rate > 0
        held(model)
        first = submitted(engine, model, lambda m: m.sample(1, steps=10), cost=10)
        assert counted(model).called.acquire(timeout=ENDS_S)
        hasty = {"cost": 3, "allowance_s": 1.0}
        second = submitted(engine, model, lambda m: m.sample(1, steps=3), **hasty)
        third = submitted(engine, model, lambda m: m.sample(1, steps=2), cost=2)
        assert engine.load[0] == 15
        assert first.seconds_left == pytest.approx(10 / rate)
        assert second.seconds_left == pytest.approx(13 / rate)  # it waits, though it is more urgent
        assert third.seconds_left == pytest.approx(15 / rate)
        assert done.seconds_left == 0
        counted(model).go_on.set()
        third.result(ENDS_S)


def test_outside_of_jobs_a_shared_model_computes_at_once(
    engine: Engine, model: TrainedModel
) -> None:
    assert np.array_equal(engine.shared(model).sample(2, steps=3), model.sample(2, steps=3))
    assert engine.batches == 0


@pytest.mark.parametrize("name", ["width", "max_images"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"engine.{name} is 0; it must be at least 1"):
        EngineSettings(**{name: 0})  # type: ignore[arg-type]


def test_a_cascade_is_served_in_all_its_stages(engine: Engine) -> None:
    """Prior, decoder and upsampler share the batches; the images are those of the cascade alone."""
    model, prompts = cascade(), ["left", "right"]
    alone = model.sample(4, prompts=prompts, seed=3)
    shared = engine.shared(model)
    jobs = [
        engine.submit(
            lambda seed=seed: shared.sample(4, prompts=prompts, seed=seed),  # type: ignore[misc]
            images=4,
            cost=0,
        )
        for seed in (3, 4)
    ]
    found = [job.result(ENDS_S) for job in jobs]
    assert np.abs(found[0].astype(int) - alone).max() <= 1
    stages = 2 * 4 * 10 + 2 * 4 * 10  # rows of decoder and upsampler, 10 steps of 4 images
    assert sum(job.computed for job in jobs) > stages


def test_no_batch_is_wider_than_the_width(model: TrainedModel) -> None:
    """A call of more rows is computed in parts, between those of others."""
    alone = model.sample(11, steps=3, labels=[0], guidance_scale=2.0)
    counted(model).batches.clear()
    with Engine(EngineSettings(width=4)) as engine:
        job = submitted(
            engine, model, lambda m: m.sample(11, steps=3, labels=[0], guidance_scale=2.0)
        )
        assert np.abs(job.result(ENDS_S).astype(int) - alone).max() <= 1
    assert max(map(len, counted(model).batches)) == 4
    assert sum(map(len, counted(model).batches)) == job.computed == 66


def test_a_job_cannot_submit_another(engine: Engine, model: TrainedModel) -> None:
    """It would wait for the room that it takes."""
    outer = engine.submit(lambda: engine.submit(lambda: None, images=1, cost=0), images=64, cost=0)
    with pytest.raises(RuntimeError, match="a job cannot submit another one"):
        outer.result(ENDS_S)
    submitted(engine, model, lambda m: m.sample(1, steps=1)).result(ENDS_S)


def test_a_cancelled_job_makes_room_for_those_behind_it(model: TrainedModel) -> None:
    with Engine(EngineSettings(max_images=2)) as engine:
        held(model)
        first = submitted(engine, model, lambda m: m.sample(1, steps=5))
        assert counted(model).called.acquire(timeout=ENDS_S)
        large = submitted(engine, model, lambda m: m.sample(2, steps=1), images=2, allowance_s=1.0)
        small = submitted(engine, model, lambda m: m.sample(1, steps=1))
        assert (large.place, small.place) == (1, 2)
        large.cancel()
        assert small.place == 0
        counted(model).go_on.set()
        small.result(ENDS_S)
        first.result(ENDS_S)


def test_a_thread_that_cannot_start_fails_its_job_alone(
    engine: Engine, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        job = submitted(engine, model, lambda m: m.sample(1, steps=1), images=64)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        job.result(ENDS_S)
    assert submitted(engine, model, lambda m: m.sample(1, steps=1), images=64).result(ENDS_S).size


def test_a_network_that_exits_ends_its_job_and_not_the_engine(
    engine: Engine, model: TrainedModel
) -> None:
    counted(model).exits = True
    with pytest.raises(SystemExit, match="the network ends its thread"):
        submitted(engine, model, lambda m: m.sample(1, steps=1)).result(ENDS_S)
    counted(model).exits = False
    submitted(engine, model, lambda m: m.sample(1, steps=1)).result(ENDS_S)


def test_a_fault_of_the_engine_leaves_no_job_waiting(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(EngineSettings(max_images=1))
    held(model)
    jobs = [submitted(engine, model, lambda m: m.sample(1, steps=2)) for _ in range(2)]
    assert counted(model).called.acquire(timeout=ENDS_S)
    monkeypatch.setattr(engine_module, "next_batch", lambda calls, width: 1 / 0)
    counted(model).go_on.set()
    with pytest.raises(JobCancelledError, match=r"the engine has failed .ZeroDivisionError"):
        jobs[0].result(ENDS_S)
    with pytest.raises(RuntimeError, match="the engine has failed"):
        jobs[1].result(ENDS_S)
    with pytest.raises(RuntimeError, match=r"the engine has failed .*; make a new one"):
        submitted(engine, model, lambda m: m.sample(1, steps=2))
    engine.close()


def test_memory_that_runs_out_between_batches_ends_that_job_alone(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a call that is wider than a batch are put together in the engine."""
    with Engine(EngineSettings(width=4)) as engine:
        real, wide = torch.cat, 6

        def cat(*parts: Any, **how: Any) -> Tensor:
            found = real(*parts, **how)
            if threading.current_thread().name == "engine" and len(found) == wide:
                raise torch.OutOfMemoryError("no memory is left")
            return found

        monkeypatch.setattr(torch, "cat", cat)
        jobs = [submitted(engine, model, lambda m, n=n: m.sample(n, steps=2)) for n in (1, wide, 2)]  # type: ignore[misc]
        with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            jobs[1].result(ENDS_S)
        assert [len(job.result(ENDS_S)) for job in (jobs[0], jobs[2])] == [1, 2]


def test_a_slow_job_is_waited_for_once(model: TrainedModel) -> None:
    """One that decodes images at each step must not hold up the steps of all others."""
    with Engine() as engine:
        slow_steps = threading.Semaphore(0)

        def dawdle(t: int, x_t: Tensor, x_0: Tensor) -> None:
            assert slow_steps.acquire(timeout=ENDS_S)

        slow = submitted(engine, model, lambda m: m.sample(1, steps=20, on_step=dawdle))
        quick = submitted(engine, model, lambda m: m.sample(1, steps=20))
        quick.result(ENDS_S)
        assert slow.computed == 1
        for _ in range(20):
            slow_steps.release()
        slow.result(ENDS_S)


def test_a_failed_job_keeps_no_tensors(engine: Engine, model: TrainedModel) -> None:
    """An error's traceback would keep those of its frames while anybody holds the job."""
    kept: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise ValueError("it fails")

    job = engine.submit(fail, images=1, cost=0)
    with pytest.raises(ValueError, match="it fails"):
        job.result(ENDS_S)
    assert kept[0]() is None


def test_a_shared_network_can_be_copied(engine: Engine, model: TrainedModel) -> None:
    network = engine.shared(model).denoiser.network
    assert copy.copy(network).batches is counted(model).batches  # type: ignore[attr-defined]
