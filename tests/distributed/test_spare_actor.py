"""The spare process on a real Ray: its result, its activity, its loss."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import ray

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed.spare_actor import SpareActor, SpareProcessLostError
from tests.limits import ENDS_S

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * ENDS_S)]


@pytest.fixture(scope="module", autouse=True)
def _local_ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def work(settings: str, report: Callable[[str], None]) -> Callable[[Any], Any]:
    """Waits until the file `settings` exists; 0: kills its process instead."""

    def call(argument: int) -> tuple[int, int]:
        if argument == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        report(f"waits with {argument}")
        while not Path(settings).exists():
            pass
        return argument, os.getpid()

    return call


def spare_actor(file: Path) -> SpareActor:
    return SpareActor(work, str(file), ClusterConfig(start_timeout_s=ENDS_S), {})


def test_a_call_returns_the_result_and_says_meanwhile_what_it_does(tmp_path: Path) -> None:
    file, seen = tmp_path / "file", set[str]()
    actor = spare_actor(file)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(actor.call, 5)
        try:
            while not any(activity.startswith("waits with 5 (for ") for activity in seen):
                assert not result.done(), result.result()
                wait([result], 0.05)
                seen.add(actor.activity())
        finally:
            file.touch()
        assert result.result(ENDS_S)[0] == 5
    assert "waits for free resources or the start of its process" in seen
    actor.close()


def test_a_killed_process_is_an_error_and_the_next_call_starts_another(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    actor = spare_actor(file)
    first = actor.call(1)
    assert actor.call(2) == (2, first[1])
    with pytest.raises(SpareProcessLostError, match=r"the spare process died \(killed, or a crash"):
        actor.call(0)
    assert actor.call(3)[1] != first[1]
    actor.close()
