"""Adapter from TrialScheduler to Ray Tune's Searcher; releases resources of dead trial drivers."""

import json
import logging
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from ddpm_ray.distributed import placement_groups
from ddpm_ray.sweep.trial import EVENT
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import Trial

log = logging.getLogger(__name__)

DIED = "killed, or its node was lost; see Ray's logs"


class TuneSearcher(Searcher):  # type: ignore[misc]  # Ray's types are not followed
    """Gives Tune at most `at_once` concurrent trials, and passes their reports to the scheduler.

    `assign(trial)` returns the arguments of a trial's driver. A driver that dies cannot remove the
    placement group of its workers, and Ray would reserve it until the sweep ends: see below.
    """

    def __init__(
        self, scheduler: TrialScheduler, assign: Callable[[Trial], dict[str, Any]], at_once: int
    ) -> None:
        super().__init__(metric=EVENT, mode="min")
        self._scheduler, self._assign, self._at_once = scheduler, assign, at_once
        self._numbers: dict[str, int] = {}  # by Tune's trial id
        self._groups: dict[int, str] = {}  # placement groups of the running trials, by number
        self._died = False  # a driver died before its placement group was known

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the arguments of the next trial's driver; None: none now; FINISHED: no more."""
        if self._died or len(self._scheduler.active) >= self._at_once:
            return None  # also until the lost placement group is found: it may hold the last CPUs
        trial = self._scheduler.next()
        if trial is None:
            finished: str = Searcher.FINISHED
            return None if self._scheduler.active else finished
        self._numbers[trial_id] = trial.number
        return self._assign(trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an event on to the scheduler."""
        event = json.loads(result[EVENT])
        if event["kind"] == "group":
            self._groups[event["number"]] = event["group"]
            self._remove_lost_groups()
        else:
            self._scheduler.on_event(event)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Handle the exit of a trial's driver: it returned, or died."""
        number = self._numbers.pop(trial_id)
        group = self._groups.pop(number, None)
        self._scheduler.on_exit(number, DIED if error else "")
        if error and group is not None:
            placement_groups.remove(group)
        self._died = self._died or (error and group is None)
        self._remove_lost_groups()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles the searcher once, into a file that is never read.

        The scheduler and its store hold locks, which cannot be pickled.
        """
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: TrialStore stores all that must outlast a driver."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""

    def _remove_lost_groups(self) -> None:
        """Remove placement groups that no running trial claims, once each has reported its own."""
        if self._died and self._groups.keys() >= self._scheduler.active:
            for group in placement_groups.worker_groups() - set(self._groups.values()):
                log.warning("a trial's driver died; its workers' placement group is removed")
                placement_groups.remove(group)
            self._died = False
