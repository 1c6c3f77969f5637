"""The number of trials that fit on the cluster at once, checked before the first starts."""

import math
from typing import Any

import ray

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.redaction import counted


def trials_at_once(config: ClusterConfig, wanted: int, spare: int = 0) -> int:
    """Return how many trials run at once: `wanted`, or for 0 as many as fit on the cluster.

    `spare`: processes of each trial next to its workers, see `worker_group.run`. Counts nodes that
    an autoscaler may add. Raises ConfigError, with the calculation, if fewer than `wanted`, or
    none, fit.
    """
    need = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    need = {resource: amount for resource, amount in need.items() if amount}
    nodes: list[dict[str, float]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    workers = sum(_workers_on(node, need) for node in nodes)
    if limit := _autoscaler_limit():
        workers = max(workers, _workers_on(limit, need))
    fit = workers // (config.num_workers + spare)
    if fit >= max(wanted, 1):
        return wanted or fit
    each = " + ".join(counted(amount, resource) for resource, amount in need.items())
    have = ", ".join(counted(sum(n.get(kind, 0) for n in nodes), kind) for kind in need)
    others = " + 1 (evaluation.where=spare)" if spare else ""
    raise ConfigError(
        f"trials_at_once is {wanted}: {max(wanted, 1)} x run.cluster.num_workers="
        f"{config.num_workers}{others} x {each} each; the cluster has {have} on "
        f"{counted(len(nodes), 'node')}, with room for {counted(workers, 'worker')}, so for "
        f"{counted(fit, 'trial')}: lower one of the two, or add nodes"
    )


def _workers_on(resources: dict[str, float], need: dict[str, float]) -> int:
    """Return how many workers fit; 1e-9 compensates rounding of fractional CPUs."""
    return min(math.floor(resources.get(name, 0) / amount + 1e-9) for name, amount in need.items())


def _autoscaler_limit() -> dict[str, float] | None:
    """Return the resources up to which the autoscaler may grow the cluster; None without one."""
    from_config: Any = ray._private.state.state.get_max_resources_from_cluster_config()
    return dict(from_config) if from_config else None
