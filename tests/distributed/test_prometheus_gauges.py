"""A run's gauges are read where Prometheus reads those of Ray."""

import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import ray

from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.heartbeat import Heartbeat
from ddpm_ray.reporting import Progress
from tests.limits import ENDS_S

pytestmark = pytest.mark.ray


def scraped(port: int) -> dict[str, float]:
    """Values of the gauges of the run `demo`, by name, as Prometheus's text format has them."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
    except (urllib.error.URLError, ConnectionError):
        return {}  # not listening yet
    found = [line for line in lines if line.startswith("ray_ddpm_ray_") and 'run="demo"' in line]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in found}


def test_a_run_shows_its_progress_to_prometheus() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port)
    try:
        control = RunControl("demo")
        control.heartbeat(Heartbeat(0, 7, "gradient", 3.5, 0.1), "group")
        control.report(Progress(7, 100, 0.25, 50.0, core_seconds=12.0))
        until_s, found = time.monotonic() + ENDS_S, {}
        while "ray_ddpm_ray_step" not in found and time.monotonic() < until_s:
            found = scraped(port)
            threading.Event().wait(0.1)  # Ray exports every few seconds and does not say when
        assert found["ray_ddpm_ray_step"] == 7
        assert found["ray_ddpm_ray_steps"] == 100
        assert found["ray_ddpm_ray_loss"] == 0.25
        assert found["ray_ddpm_ray_images_per_s"] == 50
        assert found["ray_ddpm_ray_core_seconds"] == 12
        assert found["ray_ddpm_ray_longest_stall_s"] >= 0
        assert found["ray_ddpm_ray_checkpoint_age_s"] >= 0
    finally:
        ray.shutdown()
