"""A worker before its first step: its heartbeats, and that it opens what the driver checked."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray import fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import DatasetError, open_dataset
from ddpm_ray.distributed import control_actor, heartbeat
from ddpm_ray.distributed.heartbeat import Heartbeat, describe_stall
from ddpm_ray.reporting import Command
from ddpm_ray.runs import train_worker
from ddpm_ray.training import shared_reading
from ddpm_ray.training.state import Snapshot
from tests.faults.lives import TINY
from tests.noise import pack_noise

LIMIT_S, STORAGE_S = 25.0, 180.0
OPENS = Heartbeat(rank=0, step=0, point="open", stalled_s=0.0, step_s=0.0, workers=2)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(control_actor, "time", made)
    return made


def heartbeats_of(control: control_actor._RunControlActor) -> list[Heartbeat]:
    return control_actor.RunStatus.of(control.status()).heartbeats


def test_a_worker_frozen_before_its_first_heartbeat_is_named(clock: Clock) -> None:
    """On commit c58b265 nothing was logged for 170 s: heartbeats began with the first step."""
    control = control_actor._RunControlActor()
    control.heartbeat(asdict(OPENS), "group")
    assert not describe_stall(heartbeats_of(control), LIMIT_S, STORAGE_S)
    clock.now_s = LIMIT_S + 1
    control.heartbeat(asdict(replace(OPENS, point="restore", stalled_s=20.0)), "group")
    assert control_actor.RunStatus.of(control.status()).group == "group"
    assert describe_stall(heartbeats_of(control), LIMIT_S, STORAGE_S).startswith(
        "worker 1 sent no heartbeat for 26 s, last seen at step 0, at start-up, before the "
        "process group is created; worker 0 waits at step 0, at start-up, before the checkpoint is "
        "looked up"
    )


def test_a_process_without_any_heartbeat_is_named(clock: Clock) -> None:
    """It froze before the process group was created, which others wait for, or it is alone.

    Imports from a cold disk are no stall: the first heartbeat has FIRST_HEARTBEAT times the limit.
    """
    control = control_actor._RunControlActor()
    control.expect({0: "process 41 on a", 1: "process 42 on b"}, "group")
    assert control_actor.RunStatus.of(control.status()).group == "group"
    clock.now_s = heartbeat.FIRST_HEARTBEAT * LIMIT_S - 1
    control.heartbeat(asdict(replace(OPENS, point="join")), "group")
    assert not describe_stall(heartbeats_of(control), LIMIT_S, STORAGE_S)
    clock.now_s += 2
    assert describe_stall(heartbeats_of(control), LIMIT_S, STORAGE_S) == (
        "worker 1 (process 42 on b) has not started: no heartbeat for 101 s; "
        "worker 0 waits at step 0, at start-up, before the process group is created"
    )
    alone = control_actor._RunControlActor()
    alone.expect({0: "process 43 on c"}, "group")
    clock.now_s += heartbeat.FIRST_HEARTBEAT * LIMIT_S + 1
    assert "worker 0 (process 43 on c) has not started" in describe_stall(
        heartbeats_of(alone), LIMIT_S, STORAGE_S
    )


def test_a_slow_start_is_no_stall(clock: Clock) -> None:
    """Heartbeats come from a thread: loading an index or a checkpoint may take long."""
    control = control_actor._RunControlActor()
    for clock.now_s in range(0, 3600, 2):
        for rank in range(2):
            control.heartbeat(asdict(replace(OPENS, rank=rank, stalled_s=clock.now_s)), "group")
        assert not describe_stall(heartbeats_of(control), LIMIT_S, STORAGE_S)


def test_heartbeats_of_earlier_groups_are_ignored(clock: Clock) -> None:
    control = control_actor._RunControlActor()
    control.heartbeat(asdict(replace(OPENS, workers=3)), "first")
    control.heartbeat(asdict(OPENS), "second")
    control.heartbeat(asdict(replace(OPENS, rank=2, workers=3, step=9)), "first")  # late
    assert [(one.rank, one.step) for one in heartbeats_of(control)] == [
        (0, 0),
        (1, 0),
    ]
    control.record_start(5, "second", 2)
    control.mark_done(0, "first")  # it woke up, and ends
    control.mark_done(1, "second")
    assert [one.rank for one in heartbeats_of(control)] == [0]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """The driver's settings for the workers of a run on a data set of noise."""
    pack_noise(str(tmp_path / "data"), images=45, side=4)
    pack_noise(str(tmp_path / "held-out"), images=30, side=4)
    urls = [str(tmp_path / "data"), str(tmp_path / "held-out")]
    places = [f"data.url={urls[0]}", f"evaluation.held_out_url={urls[1]}", f"storage={tmp_path}"]
    config = load_config(RunConfig, None, [*TINY, *places])
    return {
        "config": to_dict(config),
        "folder": str(tmp_path / "tiny"),
        "identity": "identity",
        "fingerprints": {url: open_dataset(url).fingerprint for url in urls},
    }


def assemble(settings: dict[str, Any]) -> None:
    config = from_dict(RunConfig, settings["config"])
    alone = Workers(1, 2, torch.device("cpu"))  # not the main worker
    train_worker.assemble(config, settings, lambda _: Command.NONE, alone)


@pytest.mark.parametrize("name", ["data", "held-out"])
def test_a_data_set_that_was_packed_again_since_the_driver_looked_is_refused(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """On commit c58b265 the workers trained on the new data set."""
    pack_noise(str(tmp_path / name), images=29, side=4)
    says = rf"{name}: this is data set \w{{12}}, and the driver saw \w{{12}}; put that one back"
    with pytest.raises(DatasetError, match=says):
        assemble(settings)


def test_a_data_set_that_the_checkpoint_was_not_trained_on_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Snapshot({}, {"data_fingerprint": "0" * 64})
    monkeypatch.setattr(shared_reading, "load_newest", lambda *_: ("checkpoints/step-1", other))
    with pytest.raises(DatasetError, match="and the checkpoint was trained on 000000000000"):
        assemble(settings)


def test_startup_points_come_before_the_points_of_a_step() -> None:
    positions = [replace(OPENS, point=point).position for point in fault_injection.ALL_POINTS]
    assert positions == sorted(positions)
    assert set(heartbeat.WAITS_FOR_OTHERS + heartbeat.WAITS_FOR_STORAGE) <= set(
        fault_injection.POINTS
    )
