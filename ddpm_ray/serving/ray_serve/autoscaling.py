"""The number of processes for the work that they have accepted.

Ray Serve sends this module to its controller by value: it imports nothing of this package.
"""

import math
from typing import Any

QUEUED_S = "queued_s"  # a process reports its accepted work under this name


class QueuePolicy:
    """An autoscaling policy of Ray Serve: each process has at most `target_s` of accepted work."""

    def __init__(self, target_s: float) -> None:
        self.target_s = target_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of processes, from Ray Serve's AutoscalingContext.

        There is one less at a time where fewer are needed: a process ends once its jobs are done.
        """
        reported = (context.aggregated_metrics or {}).get(QUEUED_S, {})
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        wanted = math.ceil(sum(reported.values()) / self.target_s)
        wanted = max(wanted, context.current_num_replicas - 1)
        return min(max(wanted, least), most), {}
