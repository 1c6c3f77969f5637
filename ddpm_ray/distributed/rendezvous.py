"""Where the workers of a group meet: torch's store, on the address of rank 0's node alone.

Torch's own default listens on every interface, and whoever reaches it may read and write its keys
without a token. What stays open is in SECURITY.md.
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

# With it torch takes a store that is there already, as `torchrun` has it, and starts none.
ENVIRONMENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}

_store: TCPStore | None = None  # of this process, for as long as it lives


def serve_store() -> tuple[str, int]:
    """The address and port of a store that this process now serves, at its node's own address."""
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
    """Have this process's process group join a store that is served, and start none.

    A function of a module, so that a worker runs it on its own environment: a method of os.environ
    would be sent with a copy of the sender's.
    """
    os.environ.update(ENVIRONMENT)


class _Backend(ray_torch._TorchBackend):  # type: ignore[misc]  # Ray's types are not followed
    """As Ray's, which asks rank 0 for a free port; ours is taken already."""

    def on_start(self, worker_group: Any, backend_config: "NodeAddressConfig") -> None:
        """Set the process group up."""
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
    """Ray's settings of torch's process group, whose store listens at one address.

    `on_group` is called with Ray's group of workers before their process group is made.
    """

    on_group: Callable[[Any], None] | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        """What Ray sets the process group up with."""
        return _Backend
