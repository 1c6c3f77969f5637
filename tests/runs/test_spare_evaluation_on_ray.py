"""Whole runs that a Ray actor evaluates in the meantime: equal rows, also if it is killed."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpm_ray.training.checkpoints import CheckpointStore
from tests.faults.lives import hashes
from tests.limits import JOB_S
from tests.runs.job import TINY_RUN, Job, command_of, rows

STEPS = 60
TINY = (
    *TINY_RUN,
    f"training.steps={STEPS}",
    "training.checkpoint_every_steps=20",
    "training.grid_every_steps=30",
    "evaluation.every_steps=20",
    "cluster.num_workers=1",
)
SPARE = "evaluation.where=spare"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3 * JOB_S),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def spare_processes(driver: int) -> list[psutil.Process]:
    processes = psutil.Process(driver).children(recursive=True)
    return [process for process in processes if "_SpareProcess" in command_of(process)]


def kill_the_evaluation(driver: int) -> None:
    """As soon as there is one: the driver's progress goes on meanwhile."""
    found = list[psutil.Process]()
    while not found:
        found = spare_processes(driver)
    found[0].kill()


def scores(job: Job) -> dict[str, Any]:
    """Metrics and provenance of the last step, from the checkpoint."""
    found = CheckpointStore(str(job.folder / "runs/digits/checkpoints")).load(groups=())
    assert found is not None
    newest: dict[str, Any] = found[1].facts["scores"]
    return newest


def evaluated(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    keys = [key for key in result["metrics"] if key.startswith("eval/")]
    return {key: rows(result, key) for key in keys}


@pytest.fixture(scope="module")
def in_step(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("in_step"), TINY).run()
    assert job.code == 0, job.reported
    return job


def assert_equal(job: Job, in_step: Job) -> None:
    """The same weights, rows bit for bit, provenance and pictures."""
    assert job.code == 0, job.reported
    assert hashes(job.result["checkpoint"]) == hashes(in_step.result["checkpoint"])
    assert scores(job) == scores(in_step)
    found = evaluated(job.result)
    assert found == evaluated(in_step.result)
    assert [step for step, _ in found["eval/fd_digits"]] == [20, 40, 60]
    for key in ("samples", "denoising"):
        assert Path(job.result[key]).read_bytes() == Path(in_step.result[key]).read_bytes()


def test_an_evaluation_that_is_killed_once_has_the_rows_of_one_in_the_step(
    in_step: Job, tmp_path: Path
) -> None:
    job = Job(tmp_path, (*TINY, SPARE)).run(at=1, strike=kill_the_evaluation)
    assert_equal(job, in_step)
    assert not list((tmp_path / "runs/digits/evaluations").glob("step-*"))
    assert re.search(r"evaluation of step \d+: the spare process died .*trying again", job.reported)


@pytest.mark.slow
def test_a_stopped_run_leaves_no_process_and_is_evaluated_by_the_next_start(
    in_step: Job, tmp_path: Path
) -> None:
    stopped = Job(tmp_path, (*TINY, SPARE)).run(
        at=20, strike=lambda driver: os.kill(driver, signal.SIGTERM)
    )
    assert stopped.code == 143, stopped.reported
    left = [process for process in psutil.process_iter() if "_SpareProcess" in command_of(process)]
    assert not left
    assert_equal(Job(tmp_path, (*TINY, SPARE)).run(), in_step)


@pytest.mark.slow
def test_what_a_killed_driver_left_is_evaluated_by_the_workers_if_so_wanted(
    in_step: Job, tmp_path: Path
) -> None:
    def kill(driver: int) -> None:
        while not spare_processes(driver):
            pass
        os.killpg(driver, signal.SIGKILL)

    killed = Job(tmp_path, (*TINY, SPARE)).run(at=20, strike=kill)
    assert killed.code == -signal.SIGKILL
    assert_equal(Job(tmp_path, TINY).run(), in_step)
