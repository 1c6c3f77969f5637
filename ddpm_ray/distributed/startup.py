"""A worker's signs of life before its training function, which Ray starts last of all.

Before it Ray makes the process group: a worker that is frozen by then holds up all others, and
their error names nobody. So the driver learns of each process as soon as Ray has made the actors,
and each beats as soon as Ray lets us run something in it.
"""

from functools import partial
from typing import Any

import ray.train

from ddpm_ray import fault_injection
from ddpm_ray.distributed import placement_groups
from ddpm_ray.distributed.control_actor import Desk
from ddpm_ray.distributed.heartbeat import Pulse

_pulse: Pulse | None = None  # of this process, until its training function has begun


def expect(desk: Desk, workers: Any) -> None:
    """Tell the driver which processes Ray has made, and have each beat; run in Ray's controller."""
    handle = workers.get_worker_group_state().placement_group_handle
    processes = {
        worker.distributed_context.world_rank: (
            f"process {worker.metadata.pid} on {worker.metadata.hostname}"
        )
        for worker in workers.get_workers()
    }
    desk.expect(processes, handle.placement_group.id.hex())
    workers.execute(begin, desk)


def begin(desk: Desk) -> None:
    """Beat from now on; run in each worker before the process group is made."""
    global _pulse
    context, group = ray.train.get_context(), placement_groups.of_this_worker()
    rank, workers = context.get_world_rank(), context.get_world_size()
    fault_injection.stand(rank, 0, "join")
    _pulse = Pulse(rank, partial(desk.beat, group=group), workers)
    _pulse.start()
    fault_injection.at("join")


def end() -> None:
    """No more beats from here: the training function has its own pulse."""
    global _pulse
    if _pulse is not None:
        _pulse.stop()
        _pulse = None


def leave(desk: Desk) -> None:
    """No more beats, and none that is missed: of a worker whose function sends none."""
    if _pulse is not None:
        end()
        context = ray.train.get_context()
        desk.rest(context.get_world_rank(), placement_groups.of_this_worker())
