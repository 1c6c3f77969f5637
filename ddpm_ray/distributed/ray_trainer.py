"""Ray Train's trainer for a worker group: our policies, and without two of Ray's callbacks."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from ddpm_ray import fault_injection
from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed import failures, startup
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.elastic_scaling import ElasticPolicy
from ddpm_ray.distributed.rendezvous import NodeAddressConfig
from ddpm_ray.tracking import mlflow_settings

UNUSED = PlacementGroupCleanerCallback, DatasetsCallback  # see GroupTrainer
ELASTIC_START_S = 30.0  # how long an elastic group waits for resources before it starts smaller
START_FAILURES = 3  # Ray's default is to retry for ever where the workers never fit


def build_trainer(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    config: ClusterConfig,
    counts: Sequence[int],
    scratch: str,
    spare: int = 0,
) -> "GroupTrainer":
    """Build Ray's trainer of the group; an elastic one leaves `spare` workers' resources free."""
    elastic = len(counts) > 1
    wait_s = min(config.start_timeout_s, ELASTIC_START_S) if elastic else config.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(wait_s)
    trainer = GroupTrainer(
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
        trainer.policy = ElasticPolicy(trainer.scaling_config, counts, trainer.control, spare)
    return trainer


class GroupTrainer(TorchTrainer):  # type: ignore[misc]  # Ray's types are not followed
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
