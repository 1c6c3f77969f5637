"""Whole training jobs on a real local Ray: unbroken, killed, interrupted, refused."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from ddpm_ray.storage import checksummed_json
from tests.faults.lives import Ended, Life, hashes
from tests.limits import JOB_S
from tests.runs.job import ROOT, TINY_RUN, Job, check_rows, command_of, rows

STEPS = 240  # some seconds: progress is told once a second
TINY = (
    *TINY_RUN,
    "model.dropout=0.1",
    f"training.steps={STEPS}",
    "training.checkpoint_every_steps=50",
    "training.log_every_steps=20",
    "training.grid_every_steps=100",
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3 * JOB_S),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def kill_a_worker(driver: int) -> None:
    processes = psutil.Process(driver).children(recursive=True)
    workers = [process for process in processes if "RayTrainWorker" in command_of(process)]
    assert len(workers) == 2
    workers[-1].kill()


def load_artifact(result: dict[str, Any], path: str) -> str:
    client = MlflowClient(tracking_uri=result["tracking_uri"])
    return Path(client.download_artifacts(result["run_id"], path)).read_text()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of which a worker was killed once; that it ended well anyway is the first thing."""
    job = Job(tmp_path_factory.mktemp("killed"), TINY).run(at=50, strike=kill_a_worker)
    assert job.code == 0, job.reported
    return job


@pytest.fixture(scope="module")
def unbroken(killed: Job) -> Ended:
    """The same run on the same data without Ray and without a fault."""
    config = str(ROOT / "conf/train/digits.yaml")
    life = Life(killed.folder / "unbroken", str(killed.folder / "data/digits"), TINY, config)
    life.drive()
    assert life.live(count=2)
    return life.end()


def test_a_run_leaves_what_it_says(killed: Job) -> None:
    result = killed.result
    assert result["step"] == result["steps"] == STEPS
    for key in ("samples", "denoising"):
        assert Path(result[key]).read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(tracking_uri=result["tracking_uri"])
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert run.data.params["schedule.num_steps"] == "1000"
    assert load_artifact(result, "config.yaml").startswith("name: digits\n")
    assert {"git_commit", "data_fingerprint", "version.torch"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data_fingerprint"][:36]
    assert [step for step, _ in rows(result, "train/loss")] == list(range(1, STEPS + 1))
    assert rows(result, "eval/fd_digits") == [(STEPS, result["metrics"]["eval/fd_digits"])]


def test_a_run_whose_worker_is_killed_ends_like_an_unbroken_one(
    killed: Job, unbroken: Ended
) -> None:
    """Same bits in weights, EMA and Adam's moments; the same rows, each once; the log says why."""
    (restart,) = [line for line in killed.lines if "worker group restarted at step" in line]
    assert re.search(r" with 2 workers \(worker [01] died \(killed, or a crash of its", restart)
    assert hashes(killed.result["checkpoint"]) == unbroken.hashes
    check_rows(killed.result, unbroken.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, says",
    [
        ("freeze@gradient:100/1", "worker 1 sent no heartbeat for "),
        ("hang@update:100/0", "worker 0 stalled for "),
        ("hang@reduce:100/1", "worker 1 stalled for "),
    ],
)
def test_a_worker_that_stands_still_is_named_and_the_run_goes_on(
    fault: str, says: str, unbroken: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, or in a collective that the others left: told within the limit, then the same end."""
    monkeypatch.setenv("DDPM_RAY_FAULTS", f"{tmp_path / 'fired'} {fault}")
    job = Job(tmp_path, (*TINY, "cluster.stall_timeout_s=10")).run()
    assert job.code == 0, job.reported
    (line,) = [line for line in job.lines if "restarting the worker group" in line]
    assert says in line
    assert "at step 100, " in line
    assert hashes(job.result["checkpoint"]) == unbroken.hashes


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_commits_a_checkpoint_and_the_same_command_continues(
    number: signal.Signals, code: int, unbroken: Ended, tmp_path: Path
) -> None:
    stopped = Job(tmp_path, TINY).run(at=50, strike=lambda pid: os.kill(pid, number))
    assert stopped.code == code, stopped.reported
    assert "the same command continues" in stopped.lines[-1]
    assert not stopped.result
    pointer = checksummed_json.read(str(tmp_path / "runs/digits/checkpoints/latest.json"))
    reached = int(pointer["checkpoints"][0]["folder"].split("-")[1])
    assert 50 <= reached < STEPS

    finished = Job(tmp_path, TINY).run()
    assert finished.code == 0, finished.reported
    assert hashes(finished.result["checkpoint"]) == unbroken.hashes
    assert rows(finished.result, "train/loss") == unbroken.rows["train/loss"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("model.base_channels=8",), "model.base_channels is 8, but the run began with 16"),
        (("schedule.kind=linear",), "schedule.kind is linear, but the run began with cosine"),
        (("model.channel_mults=[1,2,2,2,2]",), "which 5 levels do not halve evenly"),
    ],
)
def test_another_model_under_the_same_name_is_refused(
    arguments: tuple[str, ...], says: str, killed: Job
) -> None:
    refused = Job(killed.folder, (*TINY, *arguments)).run()
    assert refused.code == 2
    assert says in refused.reported
    assert "starting" not in refused.reported  # before Ray
