"""Bit-reproducible GPU runs: the settings of training.deterministic.

On CPUs the default algorithms are deterministic. On GPUs some of cuDNN and cuBLAS are not, and
cuDNN's benchmark mode may choose a different algorithm in each process.
"""

import torch

# Read when a process first uses CUDA or NCCL, so set before a worker starts.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one of two values that make cuBLAS deterministic
    "NCCL_ALGO": "Ring",  # the default depends on measured times; algorithms differ in sum order
}


def environment(deterministic: bool) -> dict[str, str]:
    """Return the environment variables of a worker."""
    return dict(ENVIRONMENT) if deterministic else {}


def configure() -> None:
    """Select deterministic algorithms in this process.

    An operation without one then raises RuntimeError with its name, which ends the run.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
