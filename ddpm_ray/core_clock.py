"""The clock of core-seconds, the cost of work on CPUs and GPUs."""

import time
from collections.abc import Callable


def core_clock(device_type: str) -> Callable[[], float]:
    """Return the clock of this process's core-seconds: the CPU time of its threads.

    Of "cuda" it is wall time: a GPU costs the same whether it computes or waits.
    """
    return time.perf_counter if device_type == "cuda" else time.process_time
