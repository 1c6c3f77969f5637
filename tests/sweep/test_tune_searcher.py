"""Tune's searcher: the number of concurrent trials, and placement groups of dead drivers."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.search import Searcher

from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.diffusion.schedule_diagnostics import ScheduleDiagnostics
from ddpm_ray.distributed import placement_groups
from ddpm_ray.sweep.trial import EVENT
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import TrialStore
from ddpm_ray.sweep.tune_searcher import TuneSearcher

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's and MLflow's


class Cluster:
    """A TuneSearcher of four trials, two at once, and the placement groups of their workers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        config = SweepConfig(space=({"seed": [1, 2, 3, 4]},), metric="eval/fid")
        sound = ScheduleDiagnostics(1e-4, 0.0, 0.0)
        self.scheduler = TrialScheduler(
            config, TrialStore(str(folder)), lambda _: sound, lambda _: None
        )
        self.tune = TuneSearcher(self.scheduler, lambda trial: {"number": trial.number}, at_once=2)
        self.groups: set[str] = set()
        patch.setattr(placement_groups, "worker_groups", lambda: set(self.groups))
        patch.setattr(placement_groups, "remove", self.groups.discard)

    def begin(self, trial_id: str, group: str = "") -> int:
        """The number of the trial that Tune begins under this id, whose workers take `group`."""
        arguments = self.tune.suggest(trial_id)
        assert isinstance(arguments, dict)
        self.groups |= {group} if group else set()
        return int(arguments["number"])

    def report(self, trial_id: str, kind: str, number: int, **facts: Any) -> None:
        event = {"kind": kind, "number": number} | facts
        self.tune.on_trial_result(trial_id, {EVENT: json.dumps(event)})

    def finish(self, trial_id: str, number: int, group: str = "") -> None:
        outcome = {"metrics": {"eval/fid": 1.0}}
        self.report(trial_id, "ended", number, finished=True, outcome=outcome)
        self.groups.discard(group)
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


def test_tune_can_pickle_it_as_it_starts(cluster: Cluster) -> None:
    cloudpickle.dumps(cluster.tune)


def test_the_placement_group_of_a_dead_driver_is_removed(cluster: Cluster) -> None:
    number = cluster.begin("a", "group-a")
    cluster.report("a", "group", number, group="group-a")
    cluster.tune.on_trial_complete("a", error=True)
    assert not cluster.groups
    assert cluster.begin("b") == number, "and its trial begins again"


@pytest.mark.parametrize("other", ["reports", "ends"])
def test_an_unreported_group_is_found_by_the_reported_ones(cluster: Cluster, other: str) -> None:
    """Until then no trial starts: it would wait for those resources and never report its group."""
    cluster.begin("a", "group-a")
    number = cluster.begin("b", "group-b")
    cluster.tune.on_trial_complete("a", error=True)
    assert cluster.groups == {"group-a", "group-b"}
    assert cluster.tune.suggest("c") is None
    if other == "reports":
        cluster.report("b", "group", number, group="group-b")
    else:
        cluster.finish("b", number, "group-b")
    assert cluster.groups == ({"group-b"} if other == "reports" else set())
    assert cluster.begin("c") == 0


def test_a_driver_that_dies_again_and_again_is_given_up(cluster: Cluster) -> None:
    cluster.begin("other")
    for attempt in range(3):
        assert cluster.begin(f"{attempt}", "group") == 1
        cluster.report(f"{attempt}", "group", 1, group="group")
        cluster.tune.on_trial_complete(f"{attempt}", error=True)
    assert cluster.begin("next") == 2
    assert cluster.scheduler.store.trials[1].status == "failed"
    assert cluster.scheduler.store.trials[1].reason.startswith("its driver died 3 times: killed")
