"""Run a group of Ray Train workers: connect to Ray, start, monitor and end the group."""

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ddpm_ray import fault_injection
from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed import failures, placement_groups, startup
from ddpm_ray.distributed.control_actor import RunControl, RunStatus
from ddpm_ray.distributed.elastic_scaling import ElasticPolicy
from ddpm_ray.distributed.heartbeat import describe_stall
from ddpm_ray.distributed.ray_address import require_listener
from ddpm_ray.distributed.rendezvous import NodeAddressConfig
from ddpm_ray.distributed.signals import Interrupts, block_terminal_signals
from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.storage import object_store
from ddpm_ray.tracking import mlflow_settings

log = logging.getLogger(__name__)

POLL_S = 0.5
DRAIN_POLL_S = 2.0  # interval at which Ray is asked for draining nodes
UNUSED = PlacementGroupCleanerCallback, DatasetsCallback  # see _Trainer
ELASTIC_START_S = 30.0  # how long an elastic group waits for resources before it starts smaller
CONNECT_S = 10.0  # how long an address that refuses connections is retried
START_FAILURES = 3  # Ray's default is to retry for ever where the workers never fit

# Ray Train reads these in the driver. Its default health check interval is 2 s.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line is printed twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves a process; not used
    "RAY_USAGE_STATS_ENABLED": "0",
}
# A local Ray would serve metrics on every interface without a token, and nobody reads them.
LOCAL_ENVIRONMENT = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",  # an invalid port: the autoscaler runs without metrics
}


class RunFailedError(RuntimeError):
    """The run cannot go on; the message is one line."""


def connect(address: str, cpus: float = 0, gpus: float = 0) -> None:
    """Join the cluster at `address` or $RAY_ADDRESS; if both are empty, start a local Ray.

    A local Ray is started with at least `cpus` logical CPUs. Raises RunFailedError where it does
    not start or has fewer than `gpus`, or where no Ray answers at the address.
    """
    for key, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        return
    if address := address or os.environ.get("RAY_ADDRESS", ""):
        try:
            require_listener(address, CONNECT_S, CONNECT_S)
            with block_terminal_signals():
                ray.init(address=address, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise RunFailedError(
                f"cluster.address: no Ray answers at {address} ({' '.join(str(error).split())}); "
                f"start it with `ray start --head`, or leave it empty for a local Ray"
            ) from error
        return
    for key, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # address="local": ray.init() alone joins any Ray that runs on this host.
    here = max(os.cpu_count() or 1, math.ceil(cpus))
    try:
        with block_terminal_signals():  # a closed terminal must not end Ray before a checkpoint
            ray.init(address="local", num_cpus=here, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises no class of its own
        text = " ".join(str(error).split()) or type(error).__name__
        raise RunFailedError(
            f"Ray did not start on this machine ({text}); free CPU time and memory, or name a "
            f"running cluster in cluster.address"
        ) from error
    found = ray.available_resources().get("GPU", 0)
    if gpus > found:
        raise RunFailedError(
            f"cluster.gpus_per_worker: the workers need {counted(gpus, 'GPU')}, this machine "
            f"has {found:g}; set it to 0 to train on CPUs, or name a cluster in cluster.address"
        )


def run(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    config: ClusterConfig,
    on_progress: Callable[[Progress], bool | None],
    on_start: Callable[[int, str], None] = lambda *_: None,
    counts: Sequence[int] = (),
) -> Any:
    """Run `worker(settings)` on each worker of a group and return what rank 0's call returned.

    settings["control"] is added; settings["environment"], if given, is added to each worker's
    environment. `on_progress` gets the newest progress twice a second; if it returns True, or at
    the first signal (SIGINT, SIGTERM, SIGHUP, SIGQUIT), the workers commit a checkpoint and stop. A
    second signal raises KeyboardInterrupt at once. `on_start` gets the step and the placement group
    of each start of the group. `counts`, ascending: allowed numbers of workers, of which the group
    uses the largest that fits. Raises RunFailedError or ControlLostError, each with a one-line
    message.
    """
    workers = config.num_workers
    log.info("starting %s on Ray ...", counted(workers, "worker"))
    connect(config.address, workers * config.cpus_per_worker, workers * config.gpus_per_worker)
    object_store.set_retry_timeout(config.storage_timeout_s)  # outlast a storage outage
    control, scratch = RunControl(), tempfile.mkdtemp(prefix="ddpm-ray-train-")  # mode 0700
    trainer = _trainer(worker, settings | {"control": control}, config, counts, scratch)
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
        raise RunFailedError(monitor.stall or failures.reason(error)) from error
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


def _trainer(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    config: ClusterConfig,
    counts: Sequence[int],
    scratch: str,
) -> "_Trainer":
    """Build Ray's trainer of the group."""
    elastic = len(counts) > 1
    wait_s = min(config.start_timeout_s, ELASTIC_START_S) if elastic else config.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(wait_s)
    trainer = _Trainer(
        worker,
        train_loop_config=settings,
        torch_config=NodeAddressConfig(
            backend="nccl" if config.gpus_per_worker else "gloo",
            timeout_s=int(config.timeout_s),
            on_group=partial(startup.expect_workers, settings["control"]),
        ),
        scaling_config=ScalingConfig(
            num_workers=(counts[0], counts[-1]) if elastic else config.num_workers,
            elastic_resize_monitor_interval_s=config.resize_every_s,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_resources(config),
        ),
        run_config=RunConfig(
            # Ray's own checkpoints are not used (ARCHITECTURE.md, Decisions).
            name="attempt",
            storage_path=scratch,
            # We log each error in one line; Ray logs a trace per worker and attempt.
            logging_config=LoggingConfig(log_level="CRITICAL"),
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=START_FAILURES
            ),
            worker_runtime_env={
                "env_vars": _worker_environment(config) | settings.get("environment", {})
            },
        ),
    )
    trainer.control = settings["control"]
    if elastic:
        trainer.policy = ElasticPolicy(trainer.scaling_config, counts, trainer.control)
    return trainer


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's types are not followed
    """TorchTrainer without two callbacks of Ray, each of which starts an actor per group.

    PlacementGroupCleaner (600 MB) asks the State API whether the group's controller lives and takes
    "not found" for dead: with a second cluster on the host it removed four healthy groups; where
    the API is down it removes none. `placement_groups` does its work, from the groups that the
    workers report. The dataset manager of Ray Data, which we do not use, adds 3 s to a start on two
    cores.
    """

    control: RunControl
    policy: ElasticPolicy | None = None  # replaces Ray's, which allows any number of workers

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        return [one for one in every if not isinstance(one, UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policies = {
            "scaling_policy": self.policy or settings["scaling_policy"],
            "failure_policy": failures.ReportedFailures(settings["failure_policy"], self.control),
        }
        return super()._initialize_and_run_controller(**settings | policies)


def _fit(trainer: TorchTrainer, outcome: dict[str, Any]) -> None:
    try:
        outcome["value"] = trainer.fit().return_value
    except BaseException as error:  # noqa: BLE001 - raised again by `run` in one line
        outcome["error"] = error


def _resources(config: ClusterConfig) -> dict[str, float]:
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    return resources


def _worker_environment(config: ClusterConfig) -> dict[str, str]:
    """Environment of the workers: threads, MLflow's settings, injected faults.

    OMP threads equal the worker's CPUs. Spinning OpenMP threads would take the core that another
    worker needs: GOMP_SPINCOUNT=0 made two workers on shared cores 1.3 to 1.7 times as fast.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))), "GOMP_SPINCOUNT": "0"}
    faults = {name: os.environ[name] for name in (fault_injection.VARIABLE,) if name in os.environ}
    return threads | mlflow_settings.chosen() | faults
