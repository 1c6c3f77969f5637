"""Where no Ray answers, or none starts, a job says so at once, in one line."""

import os
import socket
import time

import pytest
import ray

from ddpm_ray.distributed import connection, ray_address
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.ray_address import require_listener


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `connect` sets Ray's keys there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "CONNECT_S", 0.1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_address_where_nothing_listens_never_reaches_ray(
    monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    """On commit 820f16a Ray tried for more than four minutes, 20 times 41 s, without an error."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would wait for 14 minutes"))
    monkeypatch.setattr(ray_address, "RETRY_S", 0.01)
    said = rf"cluster.address: no Ray answers at 127.0.0.1:{closed_port} \(.*refused\); start it"
    with pytest.raises(RunFailedError, match=said):
        connection.connect(f"127.0.0.1:{closed_port}")


def test_the_address_of_the_dashboard_is_refused_without_a_wait() -> None:
    with pytest.raises(ConnectionError, match=r"dashboard's address; use the head's host:6379"):
        require_listener("http://127.0.0.1:8265", 1.0, patience_s=60.0)


def test_a_head_that_starts_meanwhile_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    opened: list[socket.socket] = []
    monkeypatch.setattr(
        time,
        "sleep",
        lambda _: opened.append(socket.create_server(("127.0.0.1", closed_port))),
    )
    require_listener(f"127.0.0.1:{closed_port}", 1.0, patience_s=60.0)
    assert len(opened) == 1
    opened[0].close()


@pytest.mark.parametrize("address", ["auto", "local"])
def test_an_address_without_a_port_is_left_to_ray(address: str) -> None:
    require_listener(address, 1.0)
