"""Rendezvous of the workers: a TCPStore that listens on rank 0's node address alone.

By default torch's store listens on every interface, and anyone who reaches it may read and write
its keys without a token. SECURITY.md lists what stays open.
"""

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not re-exported

# Makes torch join an existing store, as under `torchrun`, instead of starting one.
ENVIRONMENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}

_store: TCPStore | None = None  # kept alive until the process ends


def serve_store() -> tuple[str, int]:
    """Start a store at this node's address; return its address and port."""
    global _store
    address = ray.util.get_node_ip_address()
    version = ipaddress.ip_address(address).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    port = int(listening.getsockname()[1])
    _store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    return address, port


def use_served_store() -> None:
    """Make the process group of this process join the store of rank 0 instead of starting one.

    A module-level function, so that a worker changes its own environment: os.environ.update would
    be pickled with a copy of the sender's.
    """
    os.environ.update(ENVIRONMENT)


class _Backend(ray_torch._TorchBackend):  # type: ignore[misc]  # Ray's types are not followed
    """Ray's backend, with our store in place of the free port that it asks rank 0 for."""

    def on_start(self, worker_group: Any, backend_config: "NodeAddressConfig") -> None:
        """Create the process group."""
        if backend_config.on_group is not None:
            backend_config.on_group(worker_group)
        worker_group.execute(use_served_store)
        before, ray_torch.get_address_and_port = ray_torch.get_address_and_port, serve_store
        try:
            super().on_start(worker_group, backend_config)
        finally:
            ray_torch.get_address_and_port = before


@dataclass
class NodeAddressConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig whose rendezvous store listens on rank 0's node address alone.

    `on_group` is called with Ray's worker group before the process group is created.
    """

    on_group: Callable[[Any], None] | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        """Ray's hook for the backend class."""
        return _Backend
