"""The rendezvous store: it listens at one address, and torch's process group works with it."""

import subprocess
import sys

import psutil
import pytest
import ray
from ray import cloudpickle

from ddpm_ray.distributed import rendezvous
from tests.limits import ENDS_S

# Two workers of one group, with what Ray sets for them; the first serves the store.
WORKER = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
sum = torch.ones(1)
dist.all_reduce(sum)
print(int(sum))
"""
LIMIT_S = ENDS_S


def test_the_store_listens_at_the_nodes_own_address_and_workers_meet_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    address, port = rendezvous.serve_store()
    listening = psutil.Process().net_connections("tcp")
    at = {c.laddr.ip for c in listening if c.laddr.port == port and c.status == "LISTEN"}
    assert at == {address} == {"127.0.0.1"}  # torch's own: {"::"}
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for key, value in rendezvous.ENVIRONMENT.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("WORLD_SIZE", "2")
        process = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
        if rank == 0:
            first = process
    try:
        assert process.communicate(timeout=LIMIT_S)[0] == b"2\n"
        assert first.communicate(timeout=LIMIT_S)[0] == b"2\n"
    finally:
        first.kill()
        process.kill()
        monkeypatch.setattr(rendezvous, "_store", None)


def test_a_worker_with_an_address_joins_what_is_served() -> None:
    """As Ray sends it: pickled, to a process with an environment of its own."""
    sent = cloudpickle.dumps(rendezvous.use_served_store)
    script = (
        "import os, pickle, sys; pickle.loads(sys.stdin.buffer.read())();"
        "from torch.distributed.rendezvous import _torchelastic_use_agent_store as joins;"
        "print(joins(), os.environ['TORCHELASTIC_USE_AGENT_STORE'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=sent, capture_output=True, check=True, timeout=LIMIT_S
    )
    assert done.stdout == b"True True\n"
