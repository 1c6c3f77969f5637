"""Connect to Ray: to a cluster at an address, or to a local Ray that is started here."""

import logging
import math
import os

import ray

from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.ray_address import require_listener
from ddpm_ray.distributed.signals import block_terminal_signals
from ddpm_ray.redaction import counted

CONNECT_S = 10.0  # how long an address that refuses connections is retried

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


def connect(
    address: str,
    cpus: float = 0,
    gpus: float = 0,
    options: tuple[str, str] = ("cluster.address", "cluster.gpus_per_worker"),
) -> None:
    """Join the cluster at `address` or $RAY_ADDRESS; if both are empty, start a local Ray.

    A local Ray is started with at least `cpus` logical CPUs. Raises RunFailedError where it does
    not start or has fewer than `gpus`, or where no Ray answers at the address. `options` are the
    keys of address and GPUs, for these errors.
    """
    of_address, of_gpus = options
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
                f"{of_address}: no Ray answers at {address} ({' '.join(str(error).split())}); "
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
            f"running cluster in {of_address}"
        ) from error
    found = ray.available_resources().get("GPU", 0)
    if gpus > found:
        raise RunFailedError(
            f"{of_gpus}: the workers need {counted(gpus, 'GPU')}, this machine has {found:g}; "
            f"set it to 0 to use CPUs, or name a cluster in {of_address}"
        )
