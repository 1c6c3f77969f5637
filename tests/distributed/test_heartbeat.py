"""Stall detection: which worker is blamed, and which waits are no stall."""

import threading
from dataclasses import replace

import pytest

from ddpm_ray import fault_injection
from ddpm_ray.distributed.heartbeat import (
    FIRST_STEP,
    SLOW_STEPS,
    Heartbeat,
    HeartbeatSender,
    describe_stall,
)
from tests.limits import ENDS_S

LIMIT_S, STORAGE_S = 25.0, 180.0
MOVING = Heartbeat(rank=0, step=40, point="gradient", stalled_s=0.3, step_s=0.5)
WAITING = replace(MOVING, stalled_s=30.0)


def stall(*heartbeats: Heartbeat) -> str:
    return describe_stall(list(heartbeats), LIMIT_S, STORAGE_S)


def test_moving_workers_are_no_stall() -> None:
    assert not stall()
    assert not stall(MOVING, replace(MOVING, rank=1, step=41, point="batch"))


def test_a_frozen_worker_is_named_and_not_those_that_wait_for_it() -> None:
    frozen = replace(MOVING, rank=1, silent_s=26.0)
    assert stall(replace(WAITING, step=41, point="batch"), frozen) == (
        "worker 1 sent no heartbeat for 26 s, last seen at step 40, "
        "after a worker's own loss, before gradients are summed over the workers; worker 0 waits "
        "at step 41, before the batch of a step is read"
    )


def test_the_one_furthest_behind_is_named() -> None:
    behind = replace(WAITING, rank=2, point="update")
    ahead = replace(WAITING, step=41)
    assert stall(ahead, behind).startswith("worker 2 stalled for 30 s at step 40, after")


def test_workers_that_stall_at_one_point_are_all_named() -> None:
    assert stall(replace(WAITING, rank=1), WAITING).count("stalled") == 2


@pytest.mark.parametrize("point", ["between", "snapshot", "batch"])
def test_sample_grids_and_storage_outages_are_no_stall(point: str) -> None:
    busy = replace(WAITING, rank=1, step=39 if point != "batch" else 40, point=point)
    assert not stall(replace(WAITING, step=40, point="gradient"), busy)


def test_waiting_for_a_worker_that_samples_is_no_stall() -> None:
    """Seen at the end of the demo: scores are summed once the slower worker has its samples."""
    waits, draws = replace(WAITING, point="reduce"), replace(WAITING, rank=1, point="between")
    assert not stall(waits, draws)


def test_a_worker_without_its_batch_is_named_and_not_those_that_gather_embeddings() -> None:
    """Those that wait for its embeddings are past a point of their own."""
    gathers = replace(WAITING, point="embeddings", stalled_s=LIMIT_S + STORAGE_S + 1)
    found = stall(gathers, replace(gathers, rank=1, point="batch"))
    assert found.startswith("worker 1 stalled for 206 s at step 40, before the batch")
    assert "worker 0" not in found


def test_a_completed_sum_restores_the_position() -> None:
    fault_injection.set_position(0, 8)
    fault_injection.at("between")
    with fault_injection.during("reduce"):
        assert fault_injection.position().point == "reduce"
    assert fault_injection.position().point == "between"
    with fault_injection.during("reduce"), fault_injection.during("reduce"):
        pass
    assert fault_injection.position().point == "between"


def test_an_endless_storage_outage_is_a_stall() -> None:
    waits = replace(WAITING, point="batch", stalled_s=LIMIT_S + STORAGE_S + 1)
    assert "before the batch" in stall(waits)


def test_slow_steps_and_the_first_step_have_longer_limits() -> None:
    slow = replace(WAITING, step_s=10.0)
    assert not stall(replace(slow, stalled_s=SLOW_STEPS * 10.0 - 1))
    assert stall(replace(slow, stalled_s=SLOW_STEPS * 10.0 + 1))
    first = replace(WAITING, step_s=0.0)
    assert not stall(replace(first, stalled_s=LIMIT_S * FIRST_STEP - 1))
    assert stall(replace(first, stalled_s=LIMIT_S * FIRST_STEP + 1))


def test_heartbeats_hold_the_position_of_the_training_thread_alone() -> None:
    heartbeats: list[Heartbeat] = []
    first, enough = threading.Event(), threading.Event()

    def send(heartbeat: Heartbeat) -> None:
        heartbeats.append(heartbeat)
        first.set()
        if len(heartbeats) == 2:
            enough.set()

    fault_injection.set_position(3, 8)
    fault_injection.at("update")
    upload = threading.Thread(target=fault_injection.at, args=("object",))
    upload.start()
    upload.join()
    sender = HeartbeatSender(3, send)
    sender.start()
    assert first.wait(ENDS_S)
    fault_injection.at("reduce")
    assert enough.wait(ENDS_S)
    sender.stop()
    assert [(heartbeat.rank, heartbeat.step, heartbeat.point) for heartbeat in heartbeats[:2]] == [
        (3, 8, "update"),
        (3, 8, "reduce"),
    ]
    assert all(0 <= heartbeat.stalled_s < 60 for heartbeat in heartbeats)
