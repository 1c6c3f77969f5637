"""Elastic scaling policy: resize the worker group as nodes join and leave the cluster."""

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Command

log = logging.getLogger(__name__)

CHECKPOINT_S = 30.0  # how long a resize waits for a checkpoint, which saves repeated steps


class ElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray's types are not followed
    """Ray's policy, with three changes.

    It allows only worker counts that divide the batch, leaves the resources of `spare` more
    processes free, and delays each resize until a checkpoint is committed, because Ray kills the
    workers.
    """

    def __init__(
        self, config: ScalingConfig, counts: Sequence[int], control: RunControl, spare: int = 0
    ) -> None:
        super().__init__(config)
        self._counts, self._control, self._spare = list(counts), control, spare
        self._resize: ResizeDecision | None = None
        self._requested_s = 0.0  # when the checkpoint was requested
        self._checkpoint_before = ""  # the newest one at that time
        self._known = ""  # the newest checkpoint in the last status

    def _get_num_workers_for_resource_request(self) -> int:
        return int(super()._get_num_workers_for_resource_request()) + self._spare

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """The largest allowed count that fits; the fewest workers outrank the spare processes."""
        left = self._without_spare(reserved_resources)
        possible = super()._count_possible_workers(left)
        if possible < self._counts[0]:  # training goes on, and its evaluations are given up
            possible = min(self._counts[0], super()._count_possible_workers(reserved_resources))
        return max((count for count in self._counts if count <= possible), default=0)

    def _without_spare(self, reserved_resources: Any) -> dict[str, dict[str, float]]:
        """Resources by node without those of the spare processes, as far as any node has them."""
        each = self.scaling_config._resources_per_worker_not_none
        left = {node: dict(resources) for node, resources in reserved_resources.items()}
        for _ in range(self._spare):
            for resources in left.values():
                if all(resources.get(kind, 0.0) >= amount for kind, amount in each.items()):
                    for kind, amount in each.items():
                        resources[kind] = resources.get(kind, 0.0) - amount
                    break
        return left

    def make_decision_for_running_worker_group(self, **state: Any) -> ScalingDecision:
        """Delay Ray's resize until a newer checkpoint is committed, or CHECKPOINT_S have passed."""
        newest = self._newest()  # at each call: a poll returns the reply to the one before
        if self._resize is None:
            decision = super().make_decision_for_running_worker_group(**state)
            if isinstance(decision, ResizeDecision):
                self._resize, self._requested_s = decision, time.monotonic()
                self._checkpoint_before = newest
                self._control.request(Command.CHECKPOINT)
                return NoopDecision()
            return decision
        waited_s = time.monotonic() - self._requested_s
        if newest == self._checkpoint_before and waited_s < CHECKPOINT_S:
            return NoopDecision()
        decision, self._resize = self._resize, None
        self._control.report_restart(f"resized to {counted(decision.num_workers, 'worker')}")
        return decision

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Return Ray's decision, and drop a resize that was pending when the workers were lost."""
        self._resize = None
        return super().make_decision_for_non_running_worker_group()

    def _newest(self) -> str:
        """URL of the newest committed checkpoint, as far as known; never waits for the actor.

        Ray's controller polls its workers in this thread, so a slow actor must not block it.
        """
        with contextlib.suppress(RayError):  # the driver sees it as well, and ends the run
            status = self._control.poll()
            if status is not None and status.progress is not None:
                self._known = status.progress.checkpoint
        return self._known
