"""The book of a sweep as Ray Tune's searcher: what Tune asks and hears, and places left behind."""

import json
import logging
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from ddpm_ray.distributed import placement_groups
from ddpm_ray.sweep.trial import EVENT
from ddpm_ray.sweep.trial_scheduler import Book
from ddpm_ray.sweep.trial_store import Trial

log = logging.getLogger(__name__)

DIED = "killed, or its node was lost; Ray's logs say more"


class Candidates(Searcher):  # type: ignore[misc]  # Ray's types are not followed
    """Gives Tune at most `at_once` trials of the book side by side, and the book Tune's reports.

    `brief` is what a trial's driver is told. Where such a driver dies it cannot give back the place
    of its workers; Ray would keep it until the sweep's end.
    """

    def __init__(self, book: Book, brief: Callable[[Trial], dict[str, Any]], at_once: int) -> None:
        super().__init__(metric=EVENT, mode="min")
        self._book, self._brief, self._at_once = book, brief, at_once
        self._numbers: dict[str, int] = {}  # by Tune's trial id
        self._places: dict[int, str] = {}  # placement groups of the trials at work
        self._died = False  # a driver did, and nobody knows yet which place its workers had

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What the next trial's driver is told; None for the moment, FINISHED for good."""
        if self._died or len(self._book.active) >= self._at_once:
            return None  # also until it is known which place was lost: it may be the last one
        trial = self._book.next()
        if trial is None:
            finished: str = Searcher.FINISHED
            return None if self._book.active else finished
        self._numbers[trial_id] = trial.number
        return self._brief(trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an event on to the book."""
        event = json.loads(result[EVENT])
        if event["kind"] == "group":
            self._places[event["number"]] = event["group"]
            self._free_lost_places()
        else:
            self._book.heard(event)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A trial's driver returned, or died."""
        number = self._numbers.pop(trial_id)
        place = self._places.pop(number, None)
        self._book.left(number, DIED if error else "")
        if error and place is not None:
            placement_groups.remove(place)
        self._died = self._died or (error and place is None)
        self._free_lost_places()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger holds all that outlives a driver."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def _free_lost_places(self) -> None:
        """Once each trial at work has told its place, those of this job that are left are lost."""
        if self._died and self._places.keys() >= self._book.active:
            for group in placement_groups.worker_groups() - set(self._places.values()):
                log.warning("a place of workers whose driver died is given back")
                placement_groups.remove(group)
            self._died = False
