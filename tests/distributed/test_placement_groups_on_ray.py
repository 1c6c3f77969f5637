"""Placement groups of workers are removed, however the group ends; without the State API."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.distributed import placement_groups, worker_group
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.reporting import Progress
from ddpm_ray.sweep import capacity
from tests.runs.job import command_of

CPUS = 2.0
FREE_WITHIN_S = 10.0
ONE = ClusterConfig(num_workers=1, cpus_per_worker=1, max_failures=0)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Train's, of Ray Data
]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=int(CPUS), include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(show: Callable[[Progress], bool | None], groups: list[str]) -> Any:
    """Run a group of one worker that stops on command."""

    def worker(settings: dict[str, Any]) -> str:  # nested, so that it travels by value
        control, group = settings["control"], placement_groups.current_group()
        control.record_start(0, group, 1)
        while not control.report(Progress(1, 2, 0.0, 0.0)):
            threading.Event().wait(0.05)
        return group

    return worker_group.run(worker, {}, ONE, show, lambda _, group: groups.append(group))


def all_free() -> bool:
    """Whether all CPUs are free and no placement group is left, within ten seconds."""
    until = time.monotonic() + FREE_WITHIN_S
    while ray.available_resources().get("CPU", 0.0) < CPUS or placement_groups.worker_groups():
        if time.monotonic() > until:
            return False
        threading.Event().wait(0.1)
    return True


@pytest.mark.slow
def test_a_stopped_group_is_removed() -> None:
    held: list[set[str]] = []

    def show(_: Progress) -> bool:
        held.append(placement_groups.worker_groups())
        return True

    groups: list[str] = []
    returned = run(show, groups)
    assert groups == [returned]
    assert held[0] == {returned}
    assert all_free()


@pytest.mark.slow
def test_the_group_of_a_killed_controller_is_removed() -> None:
    """Ray would keep the group until the job ends; in a sweep, after the last trial."""

    def show(_: Progress) -> None:
        for process in psutil.Process().children(recursive=True):
            if command_of(process).startswith("ray::TrainController"):
                process.kill()

    with pytest.raises(RunFailedError, match="Ray Train's controller died"):
        run(show, [])
    assert all_free()


def test_a_sweep_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    two = ClusterConfig(num_workers=2, cpus_per_worker=1)
    assert capacity.trials_at_once(two, 0) == 1
    with pytest.raises(ConfigError, match=r"3 x run\.cluster\.num_workers=2 .* 2 workers, so for"):
        capacity.trials_at_once(two, 3)
    with pytest.raises(ConfigError, match="so for 0 trials"):
        capacity.trials_at_once(ClusterConfig(num_workers=3, cpus_per_worker=1), 0)
