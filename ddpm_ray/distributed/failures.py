"""RunFailedError, and one-line reasons for failures and restarts, from Ray Train's errors."""

from collections.abc import Mapping

from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import TrainingFailedError

from ddpm_ray.distributed import fatal_errors
from ddpm_ray.distributed.control_actor import RunControl, death


class RunFailedError(RuntimeError):
    """The run cannot go on; the message is one line."""


class ReportedFailures(FailurePolicy):  # type: ignore[misc]  # Ray's types are not followed
    """Ray's failure policy, which also reports each failure to the driver.

    Ray logs a page of traces per worker, or nothing.
    """

    def __init__(self, policy: FailurePolicy, control: RunControl) -> None:
        super().__init__(policy.failure_config)
        self._policy, self._control = policy, control

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Report the reason and return Ray's decision."""
        self._control.report_restart(failure_reason(training_failed_error))
        return self._policy.make_decision(training_failed_error)


def failure_reason(error: BaseException) -> str:
    """One line on an error of Ray Train or its controller: which worker failed, and why."""
    if failures := getattr(error, "worker_failures", None):
        return _of_worker(failures)
    if isinstance(error, RayActorError):
        return (
            f"Ray Train's controller {death(error)}; the same command continues from the newest "
            f"checkpoint"
        )
    cause = getattr(error, "controller_failure", error)  # without Ray's title
    return " ".join(str(cause).split()) or type(cause).__name__


def _of_worker(failures: Mapping[int, Exception]) -> str:
    """Pick the cause among the workers' errors, by rank; "lost peer" errors only follow from it."""

    def order(entry: tuple[int, Exception]) -> tuple[int, int]:
        """Sort key: own errors first, then dead workers, then lost peers; each by rank."""
        rank, error = entry
        if isinstance(error, RayActorError):
            return 1, rank
        return (2 if fatal_errors.is_lost_peer(error) else 0), rank

    # For a dead worker Ray wraps the actor's error in one of the health check.
    bare = {rank: getattr(one, "health_check_failure", one) for rank, one in failures.items()}
    rank, error = min(bare.items(), key=order)
    if isinstance(error, RayActorError):
        return f"worker {rank} {death(error)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's memory monitor ends its message with advice.
    out_of_memory = [line for line in lines if "low on memory" in line]
    return f"worker {rank}: {[type(error).__name__, *lines, *out_of_memory][-1]}"
