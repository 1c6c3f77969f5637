"""Heartbeats of a worker before its training function, which Ray calls last.

Before that, Ray creates the process group, in which one frozen worker holds up all others, and
their error does not name it. So each process is reported to the driver as soon as Ray has created
the actors, and each worker sends heartbeats as soon as Ray lets us run code in it.
"""

from functools import partial
from typing import Any

import ray.train

from ddpm_ray import fault_injection
from ddpm_ray.distributed import placement_groups
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.heartbeat import HeartbeatSender

_sender: HeartbeatSender | None = None  # of this process, until its training function starts


def expect_workers(control: RunControl, workers: Any) -> None:
    """Report the processes and start their heartbeats; runs in Ray's controller."""
    handle = workers.get_worker_group_state().placement_group_handle
    processes = {
        worker.distributed_context.world_rank: (
            f"process {worker.metadata.pid} on {worker.metadata.hostname}"
        )
        for worker in workers.get_workers()
    }
    control.expect(processes, handle.placement_group.id.hex())
    workers.execute(start_heartbeat, control)


def start_heartbeat(control: RunControl) -> None:
    """Start heartbeats; runs in each worker before the process group is created."""
    global _sender
    context, group = ray.train.get_context(), placement_groups.current_group()
    rank, workers = context.get_world_rank(), context.get_world_size()
    fault_injection.set_position(rank, 0, "join")
    _sender = HeartbeatSender(rank, partial(control.heartbeat, group=group), workers)
    _sender.start()
    fault_injection.at("join")


def stop_heartbeat() -> None:
    """Stop the heartbeats of this module; the training function sends its own."""
    global _sender
    if _sender is not None:
        _sender.stop()
        _sender = None


def mark_done(control: RunControl) -> None:
    """Stop heartbeats and have none expected, for a worker function that sends none."""
    if _sender is not None:
        stop_heartbeat()
        context = ray.train.get_context()
        control.mark_done(context.get_world_rank(), placement_groups.current_group())
