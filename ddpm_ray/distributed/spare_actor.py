"""An actor outside the worker group, with the resources of one worker."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayActorError, RayTaskError

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.distributed.control_actor import death
from ddpm_ray.redaction import counted

POLL_S = 0.5
PING_EVERY_S = 2.0
WAITS = "waits for free resources or the start of its process"

Work: TypeAlias = Callable[[Any], Any]
Report: TypeAlias = Callable[[str], None]
Build: TypeAlias = Callable[[Any, Report], Work]
"""Builds the work from settings; the work reports its activity in words, as `draws the grid`."""


class NoSpareResourcesError(RuntimeError):
    """No node had the resources of one more worker; args are (resources, seconds)."""

    def __str__(self) -> str:
        resources, seconds = self.args
        return (
            f"no node had {resources} free within {seconds:.0f} s for a process outside the worker "
            f"group; add a node, use fewer workers, or set evaluation.where=workers"
        )


class SpareProcessLostError(OSError):
    """The spare process died or stands still, which another one may not; args are (reason,)."""

    def __str__(self) -> str:
        return f"the spare process {self.args[0]}"


class SpareClosedError(RuntimeError):
    """The caller has closed the SpareActor."""


class _SpareProcess:
    """The actor; its calls run in two threads, of which one answers pings."""

    def __init__(self, build: Build, settings: Any) -> None:
        self._build, self._settings = build, settings
        self._work: Work | None = None
        self._activity, self._since_s = "", 0.0

    def ping(self) -> tuple[str, float]:
        """Return the activity of the work, and for how many seconds it has lasted."""
        return self._activity, time.monotonic() - self._since_s

    def _report(self, activity: str) -> None:
        self._activity, self._since_s = activity, time.monotonic()

    def call(self, argument: Any) -> Any:
        """Return the result of the work; the first call builds the work and raises its errors."""
        self._report("starts")
        if self._work is None:
            self._work = self._build(self._settings, self._report)
        return self._work(argument)


class SpareActor:
    """Calls `build(settings, report)(argument)` in an actor, which starts at the first call.

    Ray ends the actor with the process that holds this object.
    """

    def __init__(
        self,
        build: Build,
        settings: Any,
        config: ClusterConfig,
        environment: Mapping[str, str],
    ) -> None:
        self._build, self._settings, self._config = build, settings, config
        self._environment = dict(environment)
        self._actor: Any = None
        self._activity = WAITS
        self._closed = threading.Event()

    def call(self, argument: Any) -> Any:
        """Return the result of the work, or raise its error.

        Raises NoSpareResourcesError, and SpareProcessLostError if the process dies or stands still.
        After any error the next call starts another actor.
        """
        finished = False
        try:
            if self._actor is None:
                self._start()
            result = self._result(self._actor.call.remote(argument))
            finished = True
            return result
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise SpareProcessLostError(death(error)) from error
        finally:
            if not finished:
                self.release()

    def activity(self) -> str:
        """Return what the process did, and for how long, when it last answered a ping."""
        return self._activity

    def release(self) -> None:
        """End the actor; the next call starts another one."""
        actor, self._actor, self._activity = self._actor, None, WAITS
        if actor is not None:
            ray.kill(actor)

    def close(self) -> None:
        """End the actor; a call in another thread raises."""
        self._closed.set()
        self.release()

    def _start(self) -> None:
        config = self._config
        # SPREAD: another node than the caller's, if one is free, and no placement group.
        options = {"scheduling_strategy": "SPREAD", "max_concurrency": 2}
        options |= {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker}
        if self._environment:
            options["runtime_env"] = {"env_vars": self._environment}
        actor = ray.remote(**options)(_SpareProcess)
        self._actor = actor.remote(self._build, self._settings)
        started, until_s = self._actor.ping.remote(), time.monotonic() + config.start_timeout_s
        while not ray.wait([started], timeout=POLL_S)[0]:
            self._require_open()
            if time.monotonic() > until_s:
                amounts = [(config.cpus_per_worker, "CPU"), (config.gpus_per_worker, "GPU")]
                needed = " and ".join(counted(n, kind) for n, kind in amounts if n)
                raise NoSpareResourcesError(needed, config.start_timeout_s)
        ray.get(started)

    def _result(self, result: Any) -> Any:
        """Wait for the result of a call while the process answers pings."""
        ping, asked_s = self._actor.ping.remote(), time.monotonic()
        while not ray.wait([result], timeout=POLL_S)[0]:
            self._require_open()
            silent_s = time.monotonic() - asked_s
            if ray.wait([ping], timeout=0)[0]:
                if silent_s > PING_EVERY_S:
                    activity, lasted_s = ray.get(ping)
                    self._activity = f"{activity} (for {lasted_s:.0f} s)"
                    ping, asked_s = self._actor.ping.remote(), time.monotonic()
            elif silent_s > self._config.stall_timeout_s:
                raise SpareProcessLostError(f"does not answer for {silent_s:.0f} s")
        return ray.get(result)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise SpareClosedError("the run ends")
