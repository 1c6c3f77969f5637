"""Reasons for restarts: the cause, not its consequences, logged by the driver."""

import logging
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import (
    FailureDecision,
    create_failure_policy,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed import control_actor, failures, worker_group
from ddpm_ray.storage.errors import StorageError

DIED = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
LOST_PEER = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711")
FULL = StorageError("/runs/a", "the disk is full", "free some space or choose another path")
IS_FULL = "/runs/a: the disk is full; free some space or choose another path"


@pytest.fixture
def control() -> Any:
    """The actor itself, in this process."""
    return control_actor._RunControlActor()


@pytest.mark.parametrize(
    "errors, says",
    [
        ({0: LOST_PEER, 1: FULL, 2: LOST_PEER}, f"worker 1: {IS_FULL}"),
        (
            {0: LOST_PEER, 1: RayActorError("0", DIED)},
            "worker 1 died (killed, or a crash of its own)",
        ),
        (
            {0: LOST_PEER, 1: WorkerHealthCheckFailedError("poll", RayActorError("0", DIED))},
            "worker 1 died (killed, or a crash of its own)",
        ),
        ({0: RayActorError("0", DIED), 1: FULL}, f"worker 1: {IS_FULL}"),
        ({1: LOST_PEER, 0: LOST_PEER}, f"worker 0: {LOST_PEER}"),
        ({0: KeyError()}, "worker 0: KeyError"),
        (
            {
                2: RayActorError(
                    "0", f"{DIED}\nTask was killed: the node was low on memory.\nadd it"
                )
            },
            "worker 2 died (killed by Ray: its node ran out of memory)",
        ),
    ],
)
def test_the_cause_is_named_not_what_the_other_workers_saw(
    errors: dict[int, Exception], says: str
) -> None:
    """On commit d926ba0 the lowest rank's error was named, often "Connection closed by peer"."""
    assert failures.failure_reason(WorkerGroupError("a page of traces", errors)) == says


@pytest.mark.parametrize(
    "error, says",
    [
        (RayActorError("0", DIED), "Ray Train's controller died (killed, or a crash of its own); "),
        (ControllerError(ValueError("no place\n  for 9 workers")), "no place for 9 workers"),
        (ValueError("a\n  b"), "a b"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_failure_of_the_controller_is_one_line(error: Exception, says: str) -> None:
    assert failures.failure_reason(error).startswith(says)


def test_a_restart_says_why_in_the_log(control: Any, caplog: pytest.LogCaptureFixture) -> None:
    """On commit d926ba0 each said "a worker was lost, or more have a place"."""
    policy = failures.ReportedFailures(
        create_failure_policy(FailureConfig(max_failures=3)), control
    )
    timeout = ControllerError(WorkerGroupStartupTimeoutError(2))
    control.record_start(0, "first", 2)
    assert policy.make_decision(WorkerGroupError("", {1: FULL})) is FailureDecision.RETRY
    policy.make_decision(timeout)  # the cause is the failure before it
    control.record_start(10, "second", 2)
    control.report_restart("resized to 3 workers")  # as elastic_scaling.py does
    control.record_start(20, "third", 3)
    control.record_start(20, "fourth", 1)
    monitor = worker_group._GroupMonitor(ClusterConfig(), lambda *_: None)
    with caplog.at_level(logging.WARNING, "ddpm_ray"):
        monitor.report_starts(control_actor.RunStatus.of(control.status()))
        monitor.stall = "worker 1 sent no heartbeat for 30 s, last seen at step 25; worker 0 waits"
        control.report_restart("worker 0 died (killed, or a crash of its own)")  # to end the stall
        control.record_start(25, "fifth", 1)
        monitor.report_starts(control_actor.RunStatus.of(control.status()))
    ours = (record for record in caplog.records if record.name == worker_group.__name__)
    assert [record.getMessage() for record in ours] == [
        f"worker group restarted at step 10 with 2 workers (worker 1: {IS_FULL})",
        "worker group restarted at step 20 with 3 workers (resized to 3 workers)",
        "worker group restarted at step 20 with 1 worker (a worker was lost)",
        "worker group restarted at step 25 with 1 worker (worker 1 sent no heartbeat for 30 s, "
        "last seen at step 25)",
    ]
