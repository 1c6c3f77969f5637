"""Whole training jobs on a real local Ray: unbroken, killed, interrupted, refused."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.cluster.job import TINY_RUN, Job, command_of, rows

STEPS = 240  # some seconds: progress is told once a second
TINY = (
    *TINY_RUN, "model.dropout=0.1", f"training.steps={STEPS}",
    "training.checkpoint_every_steps=50", "training.log_every_steps=20",
    "training.grid_every_steps=100",
)  # fmt: skip

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def kill_a_worker(driver: int) -> None:
    processes = psutil.Process(driver).children(recursive=True)
    workers = [process for process in processes if "RayTrainWorker" in command_of(process)]
    assert len(workers) == 2
    workers[-1].kill()


def hashes(checkpoint: str) -> dict[str, str]:
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def load_artifact(result: dict[str, Any], path: str) -> str:
    client = MlflowClient(tracking_uri=result["tracking_uri"])
    return Path(client.download_artifacts(result["run_id"], path)).read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("unbroken")
    job = Job(folder, TINY).run()
    assert job.code == 0, job.told
    return job


def test_a_run_leaves_what_it_says(unbroken: Job) -> None:
    result = unbroken.result
    assert result["step"] == result["steps"] == STEPS
    for key in ("samples", "denoising"):
        assert Path(result[key]).read_bytes().startswith(b"\x89PNG")
    run = MlflowClient(tracking_uri=result["tracking_uri"]).get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["schedule.num_steps"] == "1000"
    assert load_artifact(result, "config.yaml").startswith("name: digits\n")
    assert {"git_commit", "data_fingerprint", "version.torch"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data_fingerprint"][:36]
    assert [step for step, _ in rows(result, "train/loss")] == list(range(1, STEPS + 1))
    assert len(rows(result, "train/images_per_s")) == STEPS // 20
    assert rows(result, "eval/fd_digits") == [(STEPS, result["metrics"]["eval/fd_digits"])]


def test_a_run_whose_worker_is_killed_ends_like_an_unbroken_one(
    unbroken: Job, tmp_path: Path
) -> None:
    """Same bits in weights, EMA and Adam's moments; each row once, in one MLflow run."""
    killed = Job(tmp_path, TINY).run(at=50, strike=kill_a_worker)
    assert killed.code == 0, killed.told
    assert hashes(killed.result["checkpoint"]) == hashes(unbroken.result["checkpoint"])
    for key in ("train/loss", "train/grad_norm", "train/lr", "train/loss_logsnr/0_to_2"):
        assert rows(killed.result, key) == rows(unbroken.result, key)
    for key in ("train/images_per_s", "train/data_wait_share"):  # clocks: equal in number alone
        assert [s for s, _ in rows(killed.result, key)] == list(range(20, STEPS + 1, 20))
    client = MlflowClient(tracking_uri=killed.result["tracking_uri"])
    assert len(client.search_runs([client.get_experiment_by_name("ddpm-ray").experiment_id])) == 1


@pytest.mark.slow
def test_ctrl_c_commits_a_checkpoint_and_the_same_command_continues(
    unbroken: Job, tmp_path: Path
) -> None:
    stopped = Job(tmp_path, TINY).run(at=50, strike=lambda pid: os.kill(pid, signal.SIGINT))
    assert stopped.code == 130, stopped.told
    assert "the same command continues" in stopped.lines[-1]
    assert not stopped.result
    pointer = json.loads((tmp_path / "runs/digits/checkpoints/latest.json").read_text())
    reached = int(pointer[0]["folder"].split("-")[1])
    assert 50 <= reached < STEPS

    finished = Job(tmp_path, TINY).run()
    assert finished.code == 0, finished.told
    assert hashes(finished.result["checkpoint"]) == hashes(unbroken.result["checkpoint"])
    assert rows(finished.result, "train/loss") == rows(unbroken.result, "train/loss")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("model.base_channels=8",), "model.base_channels is 8, but the run began with 16"),
        (("schedule.kind=linear",), "schedule.kind is linear, but the run began with cosine"),
        (("model.channel_mults=[1,2,2,2,2]",), "which 5 levels do not halve evenly"),
    ],
)
def test_another_model_under_the_same_name_is_refused(
    arguments: tuple[str, ...], says: str, unbroken: Job
) -> None:
    refused = Job(unbroken.folder, (*TINY, *arguments)).run()
    assert refused.code == 2
    assert says in refused.told
    assert "starting" not in refused.told  # before Ray
