"""A group of Ray Train workers: the cluster it runs on, its start, its watch, its end."""

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
from ddpm_ray.config.run import ClusterConfig
from ddpm_ray.distributed import failures, placement_groups, startup
from ddpm_ray.distributed.control_actor import Desk, Notes
from ddpm_ray.distributed.elastic_scaling import ElasticPolicy
from ddpm_ray.distributed.heartbeat import stalled
from ddpm_ray.distributed.ray_address import require_listener
from ddpm_ray.distributed.rendezvous import OwnAddress
from ddpm_ray.distributed.signals import Interrupts, while_ray_starts
from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Progress, Wish
from ddpm_ray.storage import object_store
from ddpm_ray.tracking import mlflow_settings

log = logging.getLogger(__name__)

POLL_S = 0.5
LEAVING_S = 2.0  # between questions which nodes will be taken away
UNUSED = PlacementGroupCleanerCallback, DatasetsCallback  # see _Trainer
ELASTIC_START_S = 30.0  # for which an elastic group waits for places: that of a lost node is told
CONNECT_S = 10.0  # for which an address that refuses is tried again
START_FAILURES = 3  # Ray's default is to try for ever where the workers never fit

# Ray Train reads these in the driver. A report waits for the controller's poll: 2 s by default.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each printed line comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; nobody asks it yet
    "RAY_USAGE_STATS_ENABLED": "0",
}
# A local Ray's metrics would be served on every interface, without a token, and nobody reads them.
LOCAL_ENVIRONMENT = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",  # no port: as where another Ray has it, it goes on without
}


class RunFailedError(RuntimeError):
    """A run that cannot go on; one line that says why."""


def connect(address: str, cpus: float = 0, gpus: float = 0) -> None:
    """Join the cluster at `address`, or the one whose job this is, or start a local Ray.

    A local one is said to have the `cpus` that are wanted, at least; raises RunFailedError where it
    does not start or lacks the `gpus`, or where nobody answers.
    """
    for key, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized():
        return
    if address := address or os.environ.get("RAY_ADDRESS", ""):
        try:
            require_listener(address, CONNECT_S, CONNECT_S)
            with while_ray_starts():
                ray.init(address=address, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise RunFailedError(
                f"cluster.address: no Ray answers at {address} ({' '.join(str(error).split())}); "
                f"start it with `ray start --head`, or leave it empty for a local Ray"
            ) from error
        return
    for key, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # address="local": a bare init would join whatever Ray happens to run on this host.
    here = max(os.cpu_count() or 1, math.ceil(cpus))
    try:
        with while_ray_starts():  # else a closed terminal ends Ray before a checkpoint is committed
            ray.init(address="local", num_cpus=here, logging_level=logging.WARNING)
    except Exception as error:  # Ray has no class of its own for it
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
    show: Callable[[Progress], bool | None],
    on_start: Callable[[int, str], None] = lambda *_: None,
    counts: Sequence[int] = (),
) -> Any:
    """What rank 0's `worker(settings)` returned, once all workers of a group have ended.

    settings["desk"] is added; settings["environment"], where it is given, joins each worker's
    environment. `show` sees the newest progress twice a second; where it answers
    True, or at the first signal (Ctrl-C, SIGTERM, a closed terminal), the workers are asked to stop
    cleanly. The second signal ends at once with KeyboardInterrupt. `on_start` is told of each start
    of the workers: at which step, in which placement group. `counts`, rising: numbers of workers
    that will do, where not all have a place. Raises RunFailedError or ControlLostError with the
    reason in a line.
    """
    workers = config.num_workers
    log.info("starting %s on Ray ...", counted(workers, "worker"))
    connect(config.address, workers * config.cpus_per_worker, workers * config.gpus_per_worker)
    object_store.set_retry_timeout(config.storage_timeout_s)
    desk, scratch = Desk(), tempfile.mkdtemp(prefix="ddpm-ray-train-")  # of this user alone
    trainer = _trainer(worker, settings | {"desk": desk}, config, counts, scratch)
    outcome: dict[str, Any] = {}
    asked, wish = False, False
    starts = _Starts(config, on_start)
    # In a thread, because in the main one Ray takes Ctrl-C for itself and aborts without a
    # checkpoint.
    fit = threading.Thread(target=_fit, args=(trainer, outcome), name="fit", daemon=True)
    try:
        with Interrupts() as interrupts:
            fit.start()
            while fit.is_alive():
                fit.join(POLL_S)
                if notes := desk.glance():
                    starts.note(notes)
                    starts.judge(notes)
                    starts.look_out(desk)
                    wish = bool(notes.progress and show(notes.progress))
                if (interrupts.count or wish) and not asked:
                    desk.ask(Wish.STOP)
                    asked = True
        notes = desk.look()
        starts.note(notes)
        if notes.progress:
            show(notes.progress)
    finally:  # where Ray's controller died, or `show` failed, nobody else gives them back
        for place in {*starts.places, starts.group} - {""}:
            placement_groups.free(place)
        shutil.rmtree(scratch, ignore_errors=True)
    if notes.fatal is not None:
        raise RunFailedError(notes.fatal)
    if error := outcome.get("error"):
        raise RunFailedError(starts.stall or failures.reason(error)) from error
    return outcome["value"]


@dataclass
class _Starts:
    """The starts of the workers that the driver knows of, and what it does about a stall."""

    config: ClusterConfig
    on_start: Callable[[int, str], None]
    places: list[str] = field(default_factory=list)
    stall: str = ""  # of the newest start, once it was ended for one
    group: str = ""  # the newest of which a worker lives: it may not have told its start yet
    freed: str = ""  # the one that was ended for a stall
    leaving: set[str] = field(default_factory=set)  # nodes that were told of
    looked_s: float = 0.0

    def note(self, notes: Notes) -> None:
        """Pass on those that are new."""
        for start in notes.starts[len(self.places) :]:
            self.on_start(start.step, start.group)
            if self.places:
                log.warning(
                    "worker group restarted at step %d with %s (%s)",
                    start.step,
                    counted(start.workers, "worker"),
                    self.stall.partition(";")[0] or start.reason or "a worker was lost",
                )
            self.places.append(start.group)
            self.stall = ""

    def judge(self, notes: Notes) -> None:
        """End the workers, once, where one of them holds the others up."""
        self.group = notes.group
        if not self.group or self.group == self.freed:
            return
        told = stalled(notes.beats, self.config.stall_timeout_s, self.config.storage_timeout_s)
        # Workers that have died are silent too, but their place has gone back.
        if told and self.group in placement_groups.of_workers():
            log.warning("%s; all are started again", told)
            placement_groups.free(self.group)
            self.stall, self.freed = told, self.group

    def look_out(self, desk: Desk) -> None:
        """Have a checkpoint committed where a node of the workers will be taken away."""
        if not self.places or time.monotonic() - self.looked_s < LEAVING_S:
            return
        self.looked_s = time.monotonic()
        told = placement_groups.leaving_nodes() - self.leaving
        if told and (ours := told & placement_groups.nodes_of(self.places[-1])):
            self.leaving |= ours
            log.warning(
                "%s of the workers will be taken away; saving now", counted(len(ours), "node")
            )
            desk.ask(Wish.SAVE)


def _trainer(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    config: ClusterConfig,
    counts: Sequence[int],
    scratch: str,
) -> "_Trainer":
    """Ray's trainer for the group, as configured."""
    elastic = len(counts) > 1
    wait_s = min(config.start_timeout_s, ELASTIC_START_S) if elastic else config.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(wait_s)
    trainer = _Trainer(
        worker,
        train_loop_config=settings,
        torch_config=OwnAddress(
            backend="nccl" if config.gpus_per_worker else "gloo",
            timeout_s=int(config.timeout_s),
            on_group=partial(startup.expect, settings["desk"]),
        ),
        scaling_config=ScalingConfig(
            num_workers=(counts[0], counts[-1]) if elastic else config.num_workers,
            elastic_resize_monitor_interval_s=config.resize_every_s,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_resources(config),
        ),
        run_config=RunConfig(
            # Ray's own snapshots are not used (ARCHITECTURE.md, Decisions): a scratch folder.
            name="attempt",
            storage_path=scratch,
            # Errors are told once, by our own line, not with a trace for each worker and attempt.
            logging_config=LoggingConfig(log_level="CRITICAL"),
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=START_FAILURES
            ),
            worker_runtime_env={
                "env_vars": _worker_environment(config) | settings.get("environment", {})
            },
        ),
    )
    trainer.desk = settings["desk"]
    if elastic:
        trainer.policy = ElasticPolicy(trainer.scaling_config, counts, trainer.desk)
    return trainer


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's types are not followed
    """Without two of Ray's callbacks, each of which starts an actor beside every group.

    The cleaner of placement groups, 600 MB, asks the State API whether the group's controller lives
    and takes "not found" for dead: with a second cluster on the host it once freed the places of
    four healthy groups, and where the API is down it frees none. `placement` does its work, from
    what the workers themselves report. Ray Data's manager of data sets, of which we have none,
    makes a start on two cores 3 s longer.
    """

    desk: Desk
    policy: ElasticPolicy | None = None  # in place of Ray's own, which takes any number of workers

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        return [one for one in every if not isinstance(one, UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policies = {
            "scaling_policy": self.policy or settings["scaling_policy"],
            "failure_policy": failures.ReportedFailures(settings["failure_policy"], self.desk),
        }
        return super()._initialize_and_run_controller(**settings | policies)


def _fit(trainer: TorchTrainer, outcome: dict[str, Any]) -> None:
    try:
        outcome["value"] = trainer.fit().return_value
    except BaseException as error:  # noqa: BLE001 - raised again in the main thread, as one line
        outcome["error"] = error


def _resources(config: ClusterConfig) -> dict[str, float]:
    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    return resources


def _worker_environment(config: ClusterConfig) -> dict[str, str]:
    """What workers that share a node need: threads = their CPUs, and no spinning while they wait.

    And the faults that a drill asks for.

    OpenMP threads that spin steal the core that the other worker needs: GOMP_SPINCOUNT=0 gave 1.3
    to 1.7 x the wall-clock speed with two threads on shared cores.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))), "GOMP_SPINCOUNT": "0"}
    asked = {name: os.environ[name] for name in (fault_injection.VARIABLE,) if name in os.environ}
    return threads | mlflow_settings.chosen() | asked
