"""Elastic scaling policy, without Ray's controller."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)

from ddpm_ray.distributed.control_actor import RunStatus
from ddpm_ray.distributed.elastic_scaling import CHECKPOINT_S, ElasticPolicy
from ddpm_ray.reporting import Command, Progress


class SlowControl:
    """A control handle that replies when the test sets an answer; blocking calls fail."""

    def __init__(self) -> None:
        self.answer: RunStatus | Exception | None = None
        self.asked: list[Command] = []
        self.restart_reasons: list[str] = []

    def status(self) -> RunStatus:
        raise AssertionError("the controller waits for the actor")

    def poll(self) -> RunStatus | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        answer, self.answer = self.answer, None
        return answer

    def request(self, command: Command) -> None:
        self.asked.append(command)

    def report_restart(self, reason: str) -> None:
        self.restart_reasons.append(reason)


@pytest.fixture
def control() -> SlowControl:
    return SlowControl()


@pytest.fixture
def policy(control: SlowControl, monkeypatch: pytest.MonkeyPatch) -> ElasticPolicy:
    """With Ray's own decision to resize to one worker, again and again."""
    resize = ResizeDecision(num_workers=1, resources_per_worker={})
    monkeypatch.setattr(
        ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda self, **_: resize
    )
    return ElasticPolicy(ScalingConfig(num_workers=(1, 2)), [1, 2], control)  # type: ignore[arg-type]


def saved(checkpoint: str) -> RunStatus:
    return RunStatus(Progress(1, 2, 0.0, 0.0, checkpoint=checkpoint), None, [], [])


def test_a_resize_waits_for_a_newer_checkpoint_and_never_for_the_actor(
    policy: ElasticPolicy, control: SlowControl
) -> None:
    control.answer = saved("step-10")
    decide = policy.make_decision_for_running_worker_group
    assert isinstance(decide(), NoopDecision)
    assert control.asked == [Command.CHECKPOINT]
    assert isinstance(decide(), NoopDecision)  # the actor is slow
    control.answer = saved("step-10")
    assert isinstance(decide(), NoopDecision)
    control.answer = saved("step-20")
    assert control.restart_reasons == []
    assert isinstance(decide(), ResizeDecision)
    assert control.restart_reasons == ["resized to 1 worker"]


def test_a_dead_actor_holds_no_resize_up_for_ever(
    policy: ElasticPolicy, control: SlowControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.answer = RayActorError()
    assert isinstance(policy.make_decision_for_running_worker_group(), NoopDecision)
    monkeypatch.setattr("time.monotonic", lambda now=policy._requested_s: now + CHECKPOINT_S)
    assert isinstance(policy.make_decision_for_running_worker_group(), ResizeDecision)


@given(
    slots=st.lists(st.integers(0, 5), max_size=4),
    fewest=st.integers(1, 3),
    more=st.integers(0, 3),
    spare=st.integers(0, 2),
    gpus=st.booleans(),
)
def test_workers_leave_the_spare_processes_their_resources(
    slots: list[int], fewest: int, more: int, spare: int, gpus: bool
) -> None:
    """Nodes with CPUs or GPUs for so many processes; only the fewest workers outrank the spare."""
    counts = list(range(fewest, fewest + more + 1))
    config = ScalingConfig(num_workers=(counts[0], counts[-1]), use_gpu=gpus)
    policy = ElasticPolicy(config, counts, SlowControl(), spare)  # type: ignore[arg-type]
    nodes = [{"CPU": 8.0, "GPU": float(n)} if gpus else {"CPU": n + 0.5} for n in slots]
    possible = policy._count_possible_workers({str(i): node for i, node in enumerate(nodes)})
    fit = sum(slots)
    assert possible in (0, *counts)
    assert possible <= fit
    if possible > fewest:
        assert possible + spare <= fit
    if fit >= counts[-1] + spare:
        assert possible == counts[-1]
    assert (possible == 0) == (fit < fewest)


def test_the_resources_of_the_spare_processes_are_requested_of_the_autoscaler() -> None:
    """Ray reserves what is requested, so without them the workers would take them again."""
    for spare in (0, 1):
        policy = ElasticPolicy(ScalingConfig(num_workers=(1, 2)), [1, 2], SlowControl(), spare)  # type: ignore[arg-type]
        assert policy._get_num_workers_for_resource_request() == 2 + spare
