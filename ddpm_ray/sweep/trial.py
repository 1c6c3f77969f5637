"""One trial of a sweep: the function that Ray Tune runs, around the main job's own run.

It takes no CPU: it starts the trial's workers, passes on what they report, and asks them to stop
when the sweep's driver wants that. Each report is one event in JSON, which names the trial.
"""

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ddpm_ray.config.loading import from_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.distributed import placement_groups
from ddpm_ray.distributed.control_actor import ControlLostError
from ddpm_ray.reporting import Progress
from ddpm_ray.runs import train as training_run
from ddpm_ray.runs.train import Outcome, ParentSweep
from ddpm_ray.storage.object_store import StorageError
from ddpm_ray.tracking import mlflow_settings
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.training.sample_grids import picture_url

log = logging.getLogger(__name__)

OUTAGES = TrackingError, StorageError, ControlLostError
RETRY_S = 10.0, 60.0, 300.0  # after these: an outage costs time, not the trial
ASK_EVERY_S = 1.0  # the board, while a trial waits out an outage
ANSWER_S = 60.0  # of the board, an actor beside the sweep's driver
EVENT = "event"  # the key of Tune's report that holds ours


class _Board:
    """What the sweep's driver wants of the trials that run."""

    def __init__(self) -> None:
        self.stopped: set[int] = set()
        self.closed = False

    def stop(self, number: int) -> None:
        self.stopped.add(number)

    def close(self) -> None:
        self.closed = True

    def is_to_stop(self, number: int) -> bool:
        return self.closed or number in self.stopped


class Board:
    """A handle on that actor; the driver and the trials hold one."""

    def __init__(self) -> None:
        beside = placement_groups.same_node_strategy()
        self._actor: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(_Board).remote()

    def stop(self, number: int) -> None:
        """Trial `number` shall commit its checkpoint and end."""
        self._actor.stop.remote(number)

    def close(self) -> None:
        """All trials shall."""
        self._actor.close.remote()

    def is_to_stop(self, number: int) -> bool:
        """Whether trial `number` shall."""
        return bool(ray.get(self._actor.is_to_stop.remote(number), timeout=ANSWER_S))

    def lets_wait(self, number: int, wait_s: float) -> bool:
        """True after `wait_s`; False as soon as trial `number` shall stop."""
        until = time.monotonic() + wait_s
        while not self.is_to_stop(number):
            if time.monotonic() >= until:
                return True
            time.sleep(ASK_EVERY_S)
        return False


def tell(number: int, kind: str, **facts: Any) -> None:
    """Report an event of trial `number` to the sweep's driver; returns once it was taken note of.

    Kinds: `group` (the placement group its workers hold), `probe`, `ended`, `failed`.
    """
    tune.report({EVENT: json.dumps({"number": number, "kind": kind} | facts)})


def run_trial(told: dict[str, Any], *, board: Board, sweep_run_id: str) -> None:
    """Run, or continue, one trial: `told` holds its number, label, values and whole run config.

    Never raises: how the run failed is an event as well, so that Tune takes no other road.
    """
    mlflow_settings.apply()
    number, began = told["number"], time.time()
    config = from_dict(RunConfig, told["config"])
    steps_told = -1

    def show(progress: Progress) -> bool:
        """Pass on probes that are new; whether the trial shall stop."""
        nonlocal steps_told
        for probe in progress.validation_losses:
            if probe["step"] > steps_told:
                tell(number, "probe", probe=probe)
                steps_told = probe["step"]
        return board.is_to_stop(number)

    def cost() -> dict[str, float]:
        ended = time.time()
        workers = config.cluster.num_workers
        return {"began": began, "ended": ended, "worker_s": workers * (ended - began)}

    train = partial(
        training_run.train,
        config,
        Path("/"),  # every place in a trial's config is absolute
        show,
        ParentSweep(sweep_run_id, told["label"], told["values"]),
        lambda _, group: tell(number, "group", group=group),
    )
    try:
        outcome = patiently(train, partial(board.lets_wait, number))
    except Exception as error:  # noqa: BLE001 - a trial fails alone, whatever it was
        if isinstance(error, OUTAGES) and board.is_to_stop(number):
            return  # not over: the same command goes on with it
        reason = " ".join(str(error).split()) or type(error).__name__
        tell(number, "failed", reason=reason, outcome=cost())
        return
    show_last(outcome, show)
    tell(
        number,
        "ended",
        finished=outcome.finished,
        outcome=_outcome(outcome, config) | cost(),
    )


def patiently(train: Callable[[], Outcome], lets_wait: Callable[[float], bool]) -> Outcome:
    """What `train` returns; tried again after an outage, as long as `lets_wait(seconds)`."""
    for wait_s in RETRY_S:
        try:
            return train()
        except OUTAGES as error:
            log.warning("%s; tried again in %.0f s", error, wait_s)
            if not lets_wait(wait_s):
                raise
    return train()


def show_last(outcome: Outcome, show: Callable[[Progress], bool]) -> None:
    """Pass on probes that were taken after the last glance at the workers' progress."""
    step, steps = outcome.report["step"], outcome.report["steps"]
    show(Progress(step, steps, 0.0, 0.0, outcome.ended["probes"]))


def _outcome(outcome: Outcome, config: RunConfig) -> dict[str, Any]:
    """What the sweep keeps of a run that ended, or stopped, by itself."""
    report, ended = outcome.report, outcome.ended
    step, every = report["step"], config.training.grid_every_steps
    newest_grid = step if outcome.finished else step - step % max(every, 1)
    pictures = (report["samples"] or "").rpartition("/")[0]  # empty: the run draws none
    busy_s = config.cluster.num_workers * (ended["trained_to"] - ended["trained_from"])
    return {
        "run_id": report["run_id"],
        "checkpoint": report["checkpoint"],
        "step": step,
        "num_steps": config.schedule.num_steps,
        "samples": picture_url(pictures, "samples", newest_grid) if pictures else "",
        "metrics": report["metrics"] if outcome.finished else {},
        "certificate": ended["scores"].get("certificate", {}),
        "busy_s": busy_s,
        "first_step_at": ended["trained_from"],
        "last_step_at": ended["trained_to"],
    }
