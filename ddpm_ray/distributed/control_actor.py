"""The run's control actor: progress and heartbeats from its workers, commands from its driver.

A separate actor because Ray Train's report() is a barrier: it waits up to 2 s for the controller's
next poll. A call to this actor returns at once.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from ddpm_ray.distributed import placement_groups
from ddpm_ray.distributed.heartbeat import Heartbeat
from ddpm_ray.distributed.prometheus_gauges import RunGauges
from ddpm_ray.fault_injection import ALL_POINTS
from ddpm_ray.reporting import Command, Progress

ANSWER_S = 120.0  # time-out of a call; a loaded machine took 10 s to start the actor
RETRY_S = 1.0


class ControlLostError(RuntimeError):
    """The control actor is gone or does not answer; args are (reason,)."""

    def __str__(self) -> str:
        return (
            f"the control actor between driver and workers {self.args[0]}; the same command "
            f"continues from the newest checkpoint"
        )


_StatusValues: TypeAlias = tuple[
    dict[str, Any] | None, str | None, list["Start"], list[dict[str, Any]], str
]


class Start(NamedTuple):
    """One start of the worker group."""

    step: int  # the first one to train, less 1
    group: str  # id of the placement group
    workers: int
    reason: str = ""  # why the group before it ended, where it is known


class _RunControlActor:
    """The actor; it takes and returns plain values."""

    def __init__(self, run: str = "") -> None:
        self.gauges = RunGauges(run) if run else None
        self.progress: dict[str, Any] | None = None
        self.command = Command.NONE
        self.fatal: str | None = None
        self.starts: list[Start] = []
        self.restart_reason = ""  # why the newest group ended, until the next one starts
        # Time of arrival and heartbeat by rank, of the newest group.
        self.heartbeats: dict[int, tuple[float, dict[str, Any]]] = {}
        self.groups: list[str] = []  # placement groups that sent heartbeats, oldest first

    def report(self, progress: dict[str, Any]) -> Command:
        """Store the progress and return the pending command."""
        self.progress, command = progress, self.command
        if self.gauges is not None:
            now = time.monotonic()
            stalls_s = [one["stalled_s"] + now - came for came, one in self.heartbeats.values()]
            self.gauges.set(Progress(**progress), stalls_s)
        if command is Command.CHECKPOINT:  # once
            self.command = Command.NONE
        return command

    def status(self) -> _StatusValues:
        """Return the values of a RunStatus."""
        now = time.monotonic()
        heartbeats = [one | {"silent_s": now - came} for came, one in self.heartbeats.values()]
        return self.progress, self.fatal, self.starts, heartbeats, (self.groups or [""])[-1]

    def record_start(self, step: int, group: str, workers: int) -> None:
        """Append a start of the worker group."""
        self.starts.append(Start(step, group, workers, self.restart_reason))
        self.restart_reason = ""

    def report_restart(self, reason: str) -> None:
        """Store why the group ends."""
        # The first reason before a start is the cause: a new group that finds no free resources
        # fails as well.
        self.restart_reason = self.restart_reason or reason

    def expect(self, processes: dict[int, str], group: str) -> None:
        """Count the time without a heartbeat of these workers of `group`, by rank, from now on."""
        now, count = time.monotonic(), len(processes)
        self.groups.append(group)
        self.heartbeats = {
            rank: (
                now,
                asdict(Heartbeat(rank, 0, "join", 0.0, 0.0, workers=count, process=process)),
            )
            for rank, process in processes.items()
        }

    def heartbeat(self, heartbeat: dict[str, Any], group: str) -> None:
        """Store a worker's heartbeat; ignore it where `group` is older than the newest."""
        now = time.monotonic()
        if group not in self.groups:  # those of earlier groups are of workers that are gone
            self.groups.append(group)
            point = next(iter(ALL_POINTS))
            first = heartbeat | {"step": 0, "point": point, "stalled_s": 0.0, "step_s": 0.0}
            # All workers of a group start together, so a worker that sends nothing is missing.
            count = heartbeat["workers"]
            self.heartbeats = {rank: (now, first | {"rank": rank}) for rank in range(count)}
        if group == self.groups[-1]:
            self.heartbeats[heartbeat["rank"]] = now, heartbeat

    def mark_done(self, rank: int, group: str) -> None:
        """Expect no more heartbeats of this worker."""
        if group in self.groups[-1:]:
            self.heartbeats.pop(rank, None)

    def request(self, command: Command) -> None:
        """Set the pending command; STOP outranks CHECKPOINT."""
        self.command = max(self.command, command)

    def report_fatal(self, reason: str) -> None:
        """Store the first fatal error."""
        self.fatal = self.fatal or reason


@dataclass(frozen=True)
class RunStatus:
    """The state of the run that the control actor holds."""

    progress: Progress | None  # the newest
    fatal: str | None  # an error that a restart would meet again
    starts: list[Start]
    heartbeats: list[Heartbeat]  # the last one of each worker of the newest group
    group: str = ""  # its placement group; empty before its first heartbeat

    @classmethod
    def of(cls, values: _StatusValues) -> "RunStatus":
        """Build it from the actor's plain values."""
        progress, fatal, starts, heartbeats, group = values
        shown = Progress(**progress) if progress else None
        return cls(shown, fatal, starts, [Heartbeat(**one) for one in heartbeats], group)


class RunControl:
    """Handle of the control actor, for the driver and the workers."""

    def __init__(self, run: str = "") -> None:
        """`run`: its name, for the gauges of Prometheus; empty: none."""
        here = placement_groups.same_node_strategy()
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_RunControlActor)
        self._actor: Any = actor.remote(run)
        self._reports: list[Any] = []  # replies that are pending
        self._status: Any = None  # the reply to the last poll

    def report(self, progress: Progress) -> Command:
        """Send `progress` without waiting; return the command in the replies to earlier reports."""
        answered: list[Any] = []
        if self._reports:
            answered, self._reports = ray.wait(
                self._reports, num_returns=len(self._reports), timeout=0
            )
        self._reports.append(self._actor.report.remote(asdict(progress)))
        commands = [_answer(one) for one in answered]
        return max([Command.NONE, *(Command(one) for one in commands if one is not None)])

    def record_start(self, step: int, group: str, workers: int) -> None:
        """Report that the `workers` of placement group `group` start at `step`."""
        self._actor.record_start.remote(step, group, workers)

    def report_restart(self, reason: str) -> None:
        """Report why the group ends and another starts; never waits or fails."""
        with contextlib.suppress(RayError):  # the driver finds out itself that the actor is dead
            self._actor.report_restart.remote(reason)

    def expect(self, processes: dict[int, str], group: str) -> None:
        """Report which processes, by rank, are the workers of placement group `group`."""
        self._actor.expect.remote(processes, group)

    def heartbeat(self, heartbeat: Heartbeat, group: str) -> None:
        """Send the heartbeat of a worker of placement group `group`; never waits."""
        self._actor.heartbeat.remote(asdict(heartbeat), group)

    def mark_done(self, rank: int, group: str) -> None:
        """Report that this worker of placement group `group` sends no more heartbeats."""
        self._actor.mark_done.remote(rank, group)

    def poll(self) -> RunStatus | None:
        """Return the reply to the previous poll and ask again; None where none came. Never waits.

        Raises ControlLostError.
        """
        if self._status is not None and not self._answered():
            return None
        found = _answer(self._status) if self._status is not None else None
        self._status = self._actor.status.remote()
        return RunStatus.of(found) if found is not None else None

    def status(self) -> RunStatus:
        """Return the status as of now; waits. Raises ControlLostError."""
        until_s = time.monotonic() + ANSWER_S
        while (found := _answer(self._actor.status.remote(), ANSWER_S)) is None:
            if time.monotonic() > until_s:
                raise ControlLostError(f"cannot be reached for {ANSWER_S:.0f} s")
            time.sleep(RETRY_S)
        return RunStatus.of(found)

    def request(self, command: Command) -> None:
        """Send `command` to the workers; they see it one or two reports later (1 to 2 s)."""
        self._actor.request.remote(command)

    def report_fatal(self, reason: str) -> None:
        """Report an error that would recur, to the driver and to restarted workers."""
        _answer(self._actor.report_fatal.remote(reason), ANSWER_S)

    def _answered(self) -> bool:
        return self._status is not None and bool(ray.wait([self._status], timeout=0)[0])


def _answer(reply: Any, timeout_s: float | None = None) -> Any:
    """Return the actor's reply, or None while the actor lives but cannot be reached.

    Raises ControlLostError where it is dead or does not answer within `timeout_s`.
    """
    try:
        return ray.get(reply, timeout=timeout_s)
    except ActorUnavailableError:
        return None
    except RayActorError as error:
        raise ControlLostError(death(error)) from error
    except GetTimeoutError as error:
        raise ControlLostError(f"does not answer for {timeout_s:.0f} s") from error


def death(error: RayActorError) -> str:
    """Shorten Ray's report on a dead actor to `died (...)`."""
    text = str(error)
    if "low on memory" in text:
        return "died (killed by Ray: its node ran out of memory)"
    if "its node has died" in text:
        return "died (its node was lost)"
    return "died (killed, or a crash of its own)"
