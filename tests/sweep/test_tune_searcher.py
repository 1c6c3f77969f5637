"""The book as Tune's searcher: so many trials side by side, and places whose driver died."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from ddpm_ray.config.sweep import SweepConfig
from ddpm_ray.diffusion.schedule_diagnostics import ScheduleDiagnostics
from ddpm_ray.distributed import placement_groups
from ddpm_ray.sweep.trial import EVENT
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import TrialStore
from ddpm_ray.sweep.tune_searcher import TuneSearcher

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's and MLflow's


class Cluster:
    """TuneSearcher of four trials, two at once, and the places that Ray keeps for their workers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        config = SweepConfig(space=({"seed": [1, 2, 3, 4]},), metric="eval/fid")
        sound = ScheduleDiagnostics(1e-4, 0.0, 0.0)
        self.scheduler = TrialScheduler(
            config, TrialStore(str(folder)), lambda _: sound, lambda _: None
        )
        self.tune = TuneSearcher(self.scheduler, lambda trial: {"number": trial.number}, at_once=2)
        self.places: set[str] = set()
        patch.setattr(placement_groups, "worker_groups", lambda: set(self.places))
        patch.setattr(placement_groups, "remove", self.places.discard)

    def begin(self, trial_id: str, place: str = "") -> int:
        """The number of the trial that Tune begins under this id, whose workers take `place`."""
        told = self.tune.suggest(trial_id)
        assert isinstance(told, dict)
        self.places |= {place} if place else set()
        return int(told["number"])

    def hear(self, trial_id: str, kind: str, number: int, **facts: Any) -> None:
        event = {"kind": kind, "number": number} | facts
        self.tune.on_trial_result(trial_id, {EVENT: json.dumps(event)})

    def finish(self, trial_id: str, number: int, place: str = "") -> None:
        outcome = {"metrics": {"eval/fid": 1.0}}
        self.hear(trial_id, "ended", number, finished=True, outcome=outcome)
        self.places.discard(place)
        self.tune.on_trial_complete(trial_id)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_so_many_are_at_work_and_then_it_is_over(cluster: Cluster) -> None:
    begun = [cluster.begin("a"), cluster.begin("b")]
    assert cluster.tune.suggest("c") is None
    for trial_id, number, then in [("a", 0, "c"), ("b", 1, "d")]:
        cluster.finish(trial_id, number)
        begun.append(cluster.begin(then))
    assert begun == [0, 1, 2, 3]
    cluster.finish("c", 2)
    assert cluster.tune.suggest("e") is None, "the last one may die and begin again"
    cluster.finish("d", 3)
    assert cluster.tune.suggest("e") == Searcher.FINISHED
    assert [trial.status for trial in cluster.scheduler.ended] == ["finished"] * 4


def test_the_place_of_a_dead_driver_is_given_back(cluster: Cluster) -> None:
    number = cluster.begin("a", "place-a")
    cluster.hear("a", "group", number, group="place-a")
    cluster.tune.on_trial_complete("a", error=True)
    assert not cluster.places
    assert cluster.begin("b") == number, "and its trial begins again"


@pytest.mark.parametrize("other", ["tells", "ends"])
def test_a_place_that_nobody_told_of_is_found_by_those_that_are_known(
    cluster: Cluster, other: str
) -> None:
    """Meanwhile nothing begins: it would wait for that place, and never tell its own."""
    cluster.begin("a", "place-a")
    number = cluster.begin("b", "place-b")
    cluster.tune.on_trial_complete("a", error=True)
    assert cluster.places == {"place-a", "place-b"}
    assert cluster.tune.suggest("c") is None
    if other == "tells":
        cluster.hear("b", "group", number, group="place-b")
    else:
        cluster.finish("b", number, "place-b")
    assert cluster.places == ({"place-b"} if other == "tells" else set())
    assert cluster.begin("c") == 0


def test_a_driver_that_dies_again_and_again_is_given_up(cluster: Cluster) -> None:
    cluster.begin("other")
    for attempt in range(3):
        assert cluster.begin(f"{attempt}", "place") == 1
        cluster.hear(f"{attempt}", "group", 1, group="place")
        cluster.tune.on_trial_complete(f"{attempt}", error=True)
    assert cluster.begin("next") == 2
    assert cluster.scheduler.store.trials[1].status == "failed"
    assert cluster.scheduler.store.trials[1].reason.startswith("its driver died 3 times: killed")
