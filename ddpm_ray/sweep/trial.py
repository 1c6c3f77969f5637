"""One trial of a sweep: the function that Ray Tune runs around a normal training run.

It takes no CPU: it starts the trial's workers, forwards what they report, and stops them when the
sweep's driver asks for it. Each report to the driver is one event in JSON that names the trial.
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
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.tracking import mlflow_settings
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.training.reconstruction_grids import RECONSTRUCTIONS
from ddpm_ray.training.sample_grids import picture_url

log = logging.getLogger(__name__)

OUTAGES = TrackingError, StorageError, ControlLostError
RETRY_S = 10.0, 60.0, 300.0  # pauses before a trial is started again after an outage
POLL_EVERY_S = 1.0  # how often a paused trial reads its stop signal
ANSWER_S = 60.0  # limit for an answer of the StopSignals actor
EVENT = "event"  # the key of Tune's report that holds ours


class _StopSignals:
    """The actor's state: which trials shall stop."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.all = False

    def set(self, number: int) -> None:
        self.numbers.add(number)

    def set_all(self) -> None:
        self.all = True

    def is_set(self, number: int) -> bool:
        return self.all or number in self.numbers


class StopSignals:
    """Handle of an actor that holds one stop signal for each trial.

    The sweep's driver sets a signal, the trial reads it, commits a checkpoint and ends.
    """

    def __init__(self) -> None:
        next_to_driver = placement_groups.same_node_strategy()
        self._actor: Any = ray.remote(num_cpus=0, scheduling_strategy=next_to_driver)(
            _StopSignals
        ).remote()

    def set(self, number: int) -> None:
        """Ask trial `number` to commit a checkpoint and end."""
        self._actor.set.remote(number)

    def set_all(self) -> None:
        """Ask every trial, also those not started yet."""
        self._actor.set_all.remote()

    def is_set(self, number: int) -> bool:
        """Return whether trial `number` shall stop."""
        return bool(ray.get(self._actor.is_set.remote(number), timeout=ANSWER_S))

    def sleep_unless_set(self, number: int, seconds: float) -> bool:
        """Return True after `seconds`; False as soon as trial `number` shall stop."""
        until = time.monotonic() + seconds
        while not self.is_set(number):
            if time.monotonic() >= until:
                return True
            time.sleep(POLL_EVERY_S)
        return False


def report_event(number: int, kind: str, **facts: Any) -> None:
    """Report an event of trial `number` to the sweep's driver; returns once it is handled.

    Kinds: `group` (the placement group of its workers), `validation_loss`, `ended`, `failed`.
    """
    tune.report({EVENT: json.dumps({"number": number, "kind": kind} | facts)})


def run_trial(assignment: dict[str, Any], *, stop_signals: StopSignals, sweep_run_id: str) -> None:
    """Run, or continue, the trial whose number, label, values, earlier cost and config are given.

    Never raises: a failed run is reported as an event, so that Tune has no failure to handle.
    """
    mlflow_settings.apply()
    number, began = assignment["number"], time.time()
    config = from_dict(RunConfig, assignment["config"])
    newest_step = -1

    def show(progress: Progress) -> bool:
        """Report validation losses that are new; returns whether the trial shall stop."""
        nonlocal newest_step
        for loss in progress.validation_losses:
            if loss["step"] > newest_step:
                report_event(number, "validation_loss", validation_loss=loss)
                newest_step = loss["step"]
        return stop_signals.is_set(number)

    def cost() -> dict[str, float]:
        ended = time.time()
        workers = config.cluster.num_workers
        return {"began": began, "ended": ended, "worker_s": workers * (ended - began)}

    train = partial(
        training_run.run_training,
        config,
        Path("/"),  # every path in a trial's config is absolute
        show,
        ParentSweep(sweep_run_id, assignment["label"], assignment["values"]),
        lambda _, group: report_event(number, "group", group=group),
    )
    try:
        outcome = retry_outages(train, partial(stop_signals.sleep_unless_set, number))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other trials go on
        if isinstance(error, OUTAGES) and stop_signals.is_set(number):
            return  # still "running": the same command continues it
        reason = " ".join(str(error).split()) or type(error).__name__
        report_event(number, "failed", reason=reason, outcome=cost())
        return
    report_last_validation_losses(outcome, show)
    report_event(
        number,
        "ended",
        finished=outcome.finished,
        outcome=_outcome(outcome, config, assignment["earlier_core_s"]) | cost(),
    )


def retry_outages(train: Callable[[], Outcome], sleep: Callable[[float], bool]) -> Outcome:
    """Return `train()`; call it again after an outage and a pause, while `sleep(seconds)` is True.

    Raises the outage's error after the last attempt, or when `sleep` returns False.
    """
    for wait_s in RETRY_S:
        try:
            return train()
        except OUTAGES as error:
            log.warning("%s; retrying in %.0f s", error, wait_s)
            if not sleep(wait_s):
                raise
    return train()


def report_last_validation_losses(outcome: Outcome, show: Callable[[Progress], bool]) -> None:
    """Report validation losses that were measured after the last poll of the workers."""
    step, steps = outcome.report["step"], outcome.report["steps"]
    show(Progress(step, steps, 0.0, 0.0, outcome.ended["validation_losses"]))


def _outcome(outcome: Outcome, config: RunConfig, earlier_core_s: float) -> dict[str, Any]:
    """Return what the sweep stores of a run that finished or was stopped.

    `earlier_core_s`: core-seconds of the autoencoder and encoding of its data.
    """
    report, ended = outcome.report, outcome.ended
    step, every = report["step"], config.training.grid_every_steps
    newest_grid = step if outcome.finished else step - step % max(every, 1)
    pictures = (report["samples"] or "").rpartition("/")[0]  # empty: the run draws none
    key = RECONSTRUCTIONS if config.traits.reconstructs else "samples"
    busy_s = config.cluster.num_workers * (ended["trained_to"] - ended["trained_from"])
    return {
        "run_id": report["run_id"],
        "checkpoint": report["checkpoint"],
        "step": step,
        "num_steps": config.schedule.num_steps if config.traits.has_noise else 0,
        "samples": picture_url(pictures, key, newest_grid) if pictures else "",
        "metrics": report["metrics"] if outcome.finished else {},
        "certificate": ended["scores"].get("certificate", {}),
        "busy_s": busy_s,
        "core_s": earlier_core_s + ended["core_seconds"],
        "first_step_at": ended["trained_from"],
        "last_step_at": ended["trained_to"],
    }
