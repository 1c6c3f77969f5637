"""The same bits from the same GPU work: what training.deterministic sets.

On a CPU the default algorithms repeat their bits. On a GPU some of cuDNN's and cuBLAS's do not, and
cuDNN's search for the fastest may choose another one in another process.
"""

import torch

# Read once, when a process first uses CUDA or NCCL: set before a worker starts.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one of the two that make cuBLAS repeat its bits
    "NCCL_ALGO": "Ring",  # else chosen by measured times, and another one adds in another order
}


def environment(deterministic: bool) -> dict[str, str]:
    """The variables of a worker's environment."""
    return dict(ENVIRONMENT) if deterministic else {}


def configure() -> None:
    """Choose, in this process, algorithms that repeat their bits.

    An operation that has none then raises RuntimeError with its name, which ends the run.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
