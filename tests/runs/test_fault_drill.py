"""Fault-injection drill: faults are validated before a start, and results are compared."""

import json
import random
from typing import Any

import pytest

from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.runs.fault_drill import FaultResult
from tests.faults.schedules import kills
from tests.runs.job import ROOT, Job

CONFIG = str(ROOT / "conf/drill/digits.yaml")


@pytest.mark.parametrize(
    "fault, says",
    [
        ("kill@lunch", r"faults: .*'kill@lunch' is not ACTION@POINT"),
        ("kill@commit:201", "is at step 201, the run has 200"),
        ("kill@batch:5/2", "is for worker 2, the run has 2"),
        ("kill@batch:5 kill@commit:201", "is at step 201, the run has 200"),
        (" ".join(["kill@batch"] * 4), "has 4 faults, run.cluster.max_failures is 3; raise it"),
    ],
)
def test_a_fault_that_would_never_strike_is_refused(fault: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(DrillConfig, CONFIG, [f"faults=[{fault}]"])


def test_a_drill_without_faults_is_refused() -> None:
    with pytest.raises(ConfigError, match="faults is empty; name some"):
        load_config(DrillConfig, CONFIG, ["faults=[]"])


def result(**changes: Any) -> FaultResult:
    whole: dict[str, Any] = {
        "fault": "",
        "seconds": 60.0,
        "starts": [0],
        "seen_steps": 0,
        "end": ["a", "b", "c"],
        "losses": [(1, 0.5), (2, 0.25)],
    }
    return FaultResult(**whole | changes)


def test_equal_is_the_same_bytes_and_the_same_rows_each_once() -> None:
    assert result().equals(result(fault="kill@commit", starts=[0, 50], seconds=99.0))
    assert not result(end=["a", "b", "d"]).equals(result())
    assert not result(losses=[(1, 0.5), (1, 0.5), (2, 0.25)]).equals(result())
    assert not result(reason="worker 0: gone").equals(result())


def test_steps_are_lost_from_the_newest_start_on() -> None:
    assert result().repeated_steps == 0
    assert result(starts=[0, 100], seen_steps=130).repeated_steps == 30
    assert result(starts=[0, 100], seen_steps=97).repeated_steps == 0  # told once a second


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(590)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports
def test_a_killed_and_a_frozen_worker_leave_equal_runs(tmp_path: Any) -> None:
    faults = "faults=[kill@gradient:130/1,freeze@update:60/0]"
    job = Job(tmp_path, (faults,), script="drill.py", config="drill/digits.yaml").run()
    assert job.code == 0, job.reported
    assert [one["equal"] for one in job.result["faults"]] == [True, True]
    assert [one["starts"] for one in job.result["faults"]] == [[0, 100], [0, 50]]
    assert "kill@gradient:130/1  2" in job.reported


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports
def test_ten_schedules_of_kills_leave_equal_runs(tmp_path: Any) -> None:
    """As tests/faults/test_same_end.py has it of a hundred, on Ray."""
    schedules = [" ".join(kills(random.Random(seed), 3, 200, 2)) for seed in range(10)]
    faults = f"faults={json.dumps(schedules)}"
    drill = Job(tmp_path, (faults,), "drill.py", "drill/digits.yaml", limit_s=1400).run()
    assert drill.code == 0, drill.reported
    assert [one["equal"] for one in drill.result["faults"]] == [True] * len(schedules)
    assert all(len(one["starts"]) > 1 for one in drill.result["faults"])
