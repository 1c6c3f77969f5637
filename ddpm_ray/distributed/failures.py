"""Why the workers failed or were started again, in one line, as Ray Train's controller saw it."""

from collections.abc import Mapping

from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import TrainingFailedError

from ddpm_ray.distributed import fatal_errors
from ddpm_ray.distributed.control_actor import RunControl, death


class ReportedFailures(FailurePolicy):  # type: ignore[misc]  # Ray's types are not followed
    """Ray's policy, which decides; each failure is told to the driver before the next start.

    Ray itself logs them with a page of traces for each worker, or not at all.
    """

    def __init__(self, policy: FailurePolicy, control: RunControl) -> None:
        super().__init__(policy.failure_config)
        self._policy, self._control = policy, control

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Ray's own."""
        self._control.report_restart(reason(training_failed_error))
        return self._policy.make_decision(training_failed_error)


def reason(error: BaseException) -> str:
    """`error`, of Ray Train or of its controller, in one line: the worker that failed, and why."""
    if failures := getattr(error, "worker_failures", None):
        return _of_worker(failures)
    if isinstance(error, RayActorError):
        return (
            f"Ray Train's controller {death(error)}; the same command continues from the newest "
            f"checkpoint"
        )
    cause = getattr(error, "controller_failure", error)  # else with a title of Ray's before it
    return " ".join(str(cause).split()) or type(cause).__name__


def _of_worker(failures: Mapping[int, Exception]) -> str:
    """The cause among the errors of workers by rank: who lost a peer only says that one is gone."""

    def order(entry: tuple[int, Exception]) -> tuple[int, int]:
        """Sort key: own errors first, then dead workers, then lost peers; each by rank."""
        rank, error = entry
        if isinstance(error, RayActorError):
            return 1, rank
        return (2 if fatal_errors.is_lost_peer(error) else 0), rank

    # A dead worker is an error of the poll that found it so, around the actor's.
    bare = {rank: getattr(one, "health_check_failure", one) for rank, one in failures.items()}
    rank, error = min(bare.items(), key=order)
    if isinstance(error, RayActorError):
        return f"worker {rank} {death(error)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's memory monitor ends its own explanation with advice.
    out_of_memory = [line for line in lines if "low on memory" in line]
    return f"worker {rank}: {[type(error).__name__, *lines, *out_of_memory][-1]}"
