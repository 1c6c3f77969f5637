"""Messages between the jobs of an engine and its thread."""

import queue
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.serving import job_turns
from ddpm_ray.serving.engine_task import Task
from ddpm_ray.serving.job_turns import JobTurns
from ddpm_ray.serving.shared_calls import NetworkCall
from tests.limits import ENDS_S


def task() -> Task:
    return Task(None, 1, 1, 0.0, Future(), threading.Lock())


def call() -> NetworkCall:
    x_t, t = torch.zeros(1, 1, 1, 1), torch.ones(1, dtype=torch.int64)
    return NetworkCall(lambda x_t, t, conditioning: x_t, x_t, t, UNCONDITIONAL, 0.0)


def test_the_first_call_of_a_job_that_begins_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares the next batch, and its preview is there after one call."""
    monkeypatch.setattr(job_turns, "LINGER_S", ENDS_S)
    turns, old, new = JobTurns(), task(), task()
    turns.send(old, call())
    turns.begin(new)

    def begin() -> None:
        ends_s = time.monotonic() + ENDS_S
        while new not in turns._awaited:  # `collect` has read that it begins
            assert time.monotonic() < ends_s
        turns.send(new, call())

    thread = threading.Thread(target=begin)
    thread.start()
    assert set(turns.collect(idle=False, call_s=ENDS_S)) == {old, new}
    thread.join(ENDS_S)


def test_jobs_go_on_one_after_the_other_and_the_last_one_wakes_the_engine() -> None:
    turns, jobs = JobTurns(), [task() for _ in range(3)]
    for job in jobs:
        job.go_on.acquire()
    turns.hand_out((job, torch.zeros(1)) for job in jobs)
    for number, job in enumerate(jobs):
        assert [not one.go_on.locked() for one in jobs] == [n == number for n in range(3)]
        assert turns._wakes.empty()
        job.go_on.acquire(blocking=False)  # it goes on
        turns.send(job, call())
    assert turns._wakes.qsize() == 1
    assert set(turns.collect(idle=True, call_s=0.0)) == {*jobs}


def test_a_slow_job_holds_up_no_other() -> None:
    """One that was slow the last time goes on at once, and is not waited for."""
    turns, slow, quick = JobTurns(), task(), task()
    slow.is_slow = True
    for job in (slow, quick):
        job.go_on.acquire()
    turns.hand_out([(slow, torch.zeros(1)), (quick, torch.zeros(1))])
    assert not slow.go_on.locked()
    assert not quick.go_on.locked()
    turns.send(quick, call())
    assert set(turns.collect(idle=False, call_s=0.0)) == {quick}


def test_calls_before_that_of_a_slow_job_are_not_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of the chain woke nobody: the slow one behind it has the turn."""
    monkeypatch.setattr(job_turns, "LINGER_S", 0.01)
    turns, quick, slow = JobTurns(), task(), task()
    for job in (quick, slow):
        job.go_on.acquire()
    turns.hand_out([(quick, torch.zeros(1)), (slow, torch.zeros(1))])
    taken = turns._wakes.get

    def calls_meanwhile(timeout: float) -> None:
        """The quick job calls while the engine waits."""
        if quick in turns._awaited and not turns._inbox:
            turns.send(quick, call())
        return taken(timeout=timeout)

    monkeypatch.setattr(turns, "_wakes", SimpleNamespace(get=calls_meanwhile, empty=lambda: True))
    assert set(turns.collect(idle=False, call_s=0.0)) == {quick}


def test_jobs_that_begin_one_after_the_other_share_one_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a batch would wait for as long as new jobs come."""
    monkeypatch.setattr(job_turns, "LINGER_S", ENDS_S)
    turns, first = JobTurns(), task()
    turns.begin(first)
    until_s: list[float] = []

    def another_begins(timeout: float) -> None:
        """A job begins, and one that began has called."""
        until_s.append(max(turns._awaited.values()))
        if len(until_s) == 3:
            raise queue.Empty
        turns.begin(task())

    monkeypatch.setattr(turns, "_wakes", SimpleNamespace(get=another_begins, empty=lambda: True))
    turns.collect(idle=False, call_s=1.0)
    assert len({*until_s}) == 1


def test_jobs_behind_one_that_is_slow_for_the_first_time_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_turns, "LINGER_S", 0.0)
    turns, slow, behind = JobTurns(), task(), task()
    for job in (slow, behind):
        job.go_on.acquire()
    turns.hand_out([(slow, torch.zeros(1)), (behind, torch.zeros(1))])
    assert behind.go_on.locked()
    assert turns.collect(idle=False, call_s=0.0) == {}
    assert not behind.go_on.locked()


@pytest.mark.parametrize("ends", [True, False])
def test_a_job_that_makes_no_call_holds_up_no_other(ends: bool) -> None:
    """One that takes longer than a network call, or ends before its first."""
    turns, old, new = JobTurns(), task(), task()
    turns.send(old, call())
    turns.begin(new)
    if ends:
        turns.send(new)
    assert set(turns.collect(idle=False, call_s=ENDS_S if ends else 0.0)) == {old}
    assert turns.collect(idle=False, call_s=ENDS_S) == {}
