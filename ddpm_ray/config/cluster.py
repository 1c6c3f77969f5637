"""Options of the workers on a Ray cluster."""

from dataclasses import dataclass

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class ClusterConfig:
    """Workers on the Ray cluster, and the time-outs after which lost ones are replaced."""

    num_workers: int = option(1, "Ray Train workers, one process each", at_least=1)
    min_workers: int = option(
        0, "continue with this many workers if nodes are lost; 0: wait for num_workers", at_least=0
    )
    resize_every_s: float = option(
        60, "min_workers > 0: seconds between attempts to scale back up to num_workers", above=0
    )
    cpus_per_worker: float = option(1, "CPUs and torch threads of each worker", above=0)
    gpus_per_worker: float = option(0, "GPUs of each worker; above 0: CUDA and NCCL", at_least=0)
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    max_failures: int = option(
        3, "restarts of the worker group after lost workers, until the run fails", at_least=0
    )
    timeout_s: float = option(300, "timeout of a collective operation in seconds", above=0)
    stall_timeout_s: float = option(
        25,
        "seconds without progress or heartbeat of a worker before all are restarted",
        at_least=5,
    )
    storage_timeout_s: float = option(
        180,
        "seconds for which failed storage requests are retried",
        above=0,
    )
    start_timeout_s: float = option(
        600, "seconds to wait for the workers' resources while nodes boot or are occupied", above=0
    )
