"""How many workers a run goes on with, as nodes come and go; asked by Ray Train's controller."""

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

SAVE_S = 30.0  # for which a change waits for a checkpoint, so that next to no step is done twice


class ElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray's types are not followed
    """As Ray's, but with numbers of workers that can share a batch, and a checkpoint before each
    change: Ray ends the workers where they stand.
    """

    def __init__(self, config: ScalingConfig, counts: Sequence[int], control: RunControl) -> None:
        super().__init__(config)
        self._counts, self._control = list(counts), control
        self._wanted: ResizeDecision | None = None
        self._asked_s, self._saved = 0.0, ""  # when, and what was the newest checkpoint then
        self._known = ""  # the newest checkpoint, as of the last answer

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= possible), default=0)

    def make_decision_for_running_worker_group(self, **state: Any) -> ScalingDecision:
        """Ray's own, once a checkpoint was committed since it was made."""
        newest = self._newest()  # at each poll: what it says is as old as the one before
        if self._wanted is None:
            decision = super().make_decision_for_running_worker_group(**state)
            if isinstance(decision, ResizeDecision):
                self._wanted, self._asked_s = decision, time.monotonic()
                self._saved = newest
                self._control.request(Command.CHECKPOINT)
                return NoopDecision()
            return decision
        if newest == self._saved and time.monotonic() - self._asked_s < SAVE_S:
            return NoopDecision()
        decision, self._wanted = self._wanted, None
        self._control.report_restart(f"resized to {counted(decision.num_workers, 'worker')}")
        return decision

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Ray's own; a change that was wanted before the workers were lost is forgotten."""
        self._wanted = None
        return super().make_decision_for_non_running_worker_group()

    def _newest(self) -> str:
        """URL of the newest committed checkpoint that is known; never waits for the actor.

        Ray's controller polls its workers in this thread: an actor that answers late, on a loaded
        machine, would hold that up.
        """
        with contextlib.suppress(RayError):  # the driver, which sees that too, ends the run
            status = self._control.poll()
            if status is not None and status.progress is not None:
                self._known = status.progress.checkpoint
        return self._known
