"""Messages between the jobs of an engine and its thread."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.serving import job_turns
from ddpm_ray.serving.engine_task import Task
from ddpm_ray.serving.job_turns import JobTurns, Message
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
    turns.send(Message(old, call()))
    turns.send(Message(new, begins=True))

    def begin() -> None:
        ends_s = time.monotonic() + ENDS_S
        while new not in turns._begun_s:  # `collect` has read that it begins
            assert time.monotonic() < ends_s
        turns.send(Message(new, call()))

    thread = threading.Thread(target=begin)
    thread.start()
    assert set(turns.collect(idle=False, call_s=ENDS_S)) == {old, new}
    thread.join(ENDS_S)


@pytest.mark.parametrize("ends", [True, False])
def test_a_job_that_makes_no_call_holds_up_no_other(ends: bool) -> None:
    """One that takes longer than a network call, or ends before its first."""
    turns, old, new = JobTurns(), task(), task()
    turns.send(Message(old, call()))
    turns.send(Message(new, begins=True))
    if ends:
        turns.send(Message(new))
    assert set(turns.collect(idle=False, call_s=ENDS_S if ends else 0.0)) == {old}
    assert turns.collect(idle=False, call_s=ENDS_S) == {}
