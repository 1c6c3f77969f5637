"""Run a group of Ray Train workers: start, monitor and end the group."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed import failures, placement_groups
from ddpm_ray.distributed.connection import connect
from ddpm_ray.distributed.control_actor import RunControl, RunStatus
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.heartbeat import describe_stall
from ddpm_ray.distributed.ray_trainer import GroupTrainer, build_trainer
from ddpm_ray.distributed.signals import Interrupts
from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

POLL_S = 0.5
DRAIN_POLL_S = 2.0  # interval at which Ray is asked for draining nodes


def run(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    config: ClusterConfig,
    on_progress: Callable[[Progress], bool | None],
    on_start: Callable[[int, str], None] = lambda *_: None,
    counts: Sequence[int] = (),
    spare: int = 0,
) -> Any:
    """Run `worker(settings)` on each worker of a group and return what rank 0's call returned.

    settings["control"] is added; settings["environment"], if given, is added to each worker's
    environment. `on_progress` gets the newest progress twice a second; if it returns True, or at
    the first signal (SIGINT, SIGTERM, SIGHUP, SIGQUIT), the workers commit a checkpoint and stop. A
    second signal raises KeyboardInterrupt at once. `on_start` gets the step and the placement group
    of each start of the group. `counts`, ascending: allowed numbers of workers, of which the group
    uses the largest that fits. `spare`: processes outside the group that the workers start, each
    with the resources of a worker; a local Ray has CPUs for them, and an elastic group leaves them
    free. Raises RunFailedError or ControlLostError, each with a one-line message.
    """
    workers = config.num_workers
    log.info("starting %s on Ray ...", counted(workers, "worker"))
    processes = workers + spare
    connect(config.address, processes * config.cpus_per_worker, processes * config.gpus_per_worker)
    object_store.set_retry_timeout(config.storage_timeout_s)  # outlast a storage outage
    control = RunControl(settings.get("config", {}).get("name", ""))
    scratch = tempfile.mkdtemp(prefix="ddpm-ray-train-")  # mode 0700
    settings = settings | {"control": control}
    trainer = build_trainer(worker, settings, config, counts, scratch, spare)
    outcome: dict[str, Any] = {}
    stop_requested, stop = False, False
    monitor = _GroupMonitor(config, on_start)
    # In a thread: in the main thread Ray handles Ctrl-C itself and aborts without a checkpoint.
    fit = threading.Thread(target=_fit, args=(trainer, outcome), name="fit", daemon=True)
    try:
        with Interrupts() as interrupts:
            fit.start()
            while fit.is_alive():
                fit.join(POLL_S)
                if status := control.poll():
                    monitor.report_starts(status)
                    monitor.remove_stalled(status)
                    monitor.checkpoint_before_drain(control)
                    stop = bool(status.progress and on_progress(status.progress))
                if (interrupts.count or stop) and not stop_requested:
                    control.request(Command.STOP)
                    stop_requested = True
        status = control.status()
        monitor.report_starts(status)
        if status.progress:
            on_progress(status.progress)
    finally:  # where Ray's controller died or `on_progress` failed, Ray leaves the groups in place
        for group in {*monitor.groups, monitor.newest} - {""}:
            placement_groups.remove(group)
        shutil.rmtree(scratch, ignore_errors=True)
    if status.fatal is not None:
        raise RunFailedError(status.fatal)
    if error := outcome.get("error"):
        raise RunFailedError(monitor.stall or failures.failure_reason(error)) from error
    return outcome["value"]


@dataclass
class _GroupMonitor:
    """Follows the starts of the worker group; ends stalled groups, checkpoints before drains."""

    config: ClusterConfig
    on_start: Callable[[int, str], None]
    groups: list[str] = field(default_factory=list)  # placement group of each reported start
    stall: str = ""  # why the newest group was removed, if it stalled
    newest: str = ""  # the newest group with heartbeats; its start may not be reported yet
    removed: str = ""  # the group that was last removed for a stall
    draining: set[str] = field(default_factory=set)  # nodes that were logged
    drain_checked_s: float = 0.0

    def report_starts(self, status: RunStatus) -> None:
        """Call `on_start` for each new start, and log restarts."""
        for start in status.starts[len(self.groups) :]:
            self.on_start(start.step, start.group)
            if self.groups:
                log.warning(
                    "worker group restarted at step %d with %s (%s)",
                    start.step,
                    counted(start.workers, "worker"),
                    self.stall.partition(";")[0] or start.reason or "a worker was lost",
                )
            self.groups.append(start.group)
            self.stall = ""

    def remove_stalled(self, status: RunStatus) -> None:
        """Remove the newest group, once, if one of its workers holds up the others."""
        self.newest = status.group
        if not self.newest or self.newest == self.removed:
            return
        stall = describe_stall(
            status.heartbeats, self.config.stall_timeout_s, self.config.storage_timeout_s
        )
        # Dead workers are silent as well, but Ray has removed their placement group.
        if stall and self.newest in placement_groups.worker_groups():
            log.warning("%s; restarting the worker group", stall)
            placement_groups.remove(self.newest)
            self.stall, self.removed = stall, self.newest

    def checkpoint_before_drain(self, control: RunControl) -> None:
        """Request a checkpoint where a node of the group is about to be removed."""
        if not self.groups or time.monotonic() - self.drain_checked_s < DRAIN_POLL_S:
            return
        self.drain_checked_s = time.monotonic()
        new = placement_groups.draining_nodes() - self.draining
        if new and (ours := new & placement_groups.nodes_of(self.groups[-1])):
            self.draining |= ours
            log.warning(
                "%s of the worker group will be removed from the cluster; saving a checkpoint now",
                counted(len(ours), "node"),
            )
            control.request(Command.CHECKPOINT)


def _fit(trainer: GroupTrainer, outcome: dict[str, Any]) -> None:
    try:
        outcome["value"] = trainer.fit().return_value
    except BaseException as error:  # noqa: BLE001 - raised again by `run` in one line
        outcome["error"] = error
