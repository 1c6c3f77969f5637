"""Whole sweeps on a real local Ray: one trial that fails alone, drivers killed, interrupted."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ddpm_ray.storage import checksummed_json
from tests.data.latent_sets import encode_noise
from tests.limits import JOB_S
from tests.runs.job import ROOT, TINY_RUN, Job, command_of

STEPS = 120
TINY = (
    f"run_from={ROOT}/conf/train/digits.yaml",
    *(f"run.{key}" for key in TINY_RUN),
    f"run.training.steps={STEPS}",
    "run.training.checkpoint_every_steps=20",
    "run.training.grid_every_steps=40",
    "run.training.log_every_steps=20",
    "stopping.every_steps=40",
)
# One that can be trained, one whose weights overflow at once, one whose x_T is far from noise.
MIXED = "space=[{schedule.kind: [cosine]}, {training.learning_rate: [1e30]}, \
{schedule.kind: [linear], schedule.num_steps: [100]}]"
FOUR = "space=[{schedule.kind: [cosine, sigmoid], schedule.num_steps: [1000, 250]}]"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(3 * JOB_S),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


@dataclass
class Left:
    """What a sweep left behind: its trials' files, its run, the runs of its trials."""

    trials: list[dict[str, Any]]
    parent: Run
    children: list[Run]
    client: MlflowClient

    def curve(self, child: Run) -> list[tuple[int, float]]:
        rows = self.client.get_metric_history(child.info.run_id, "train/loss")
        return [(row.step, row.value) for row in rows]

    @property
    def scores(self) -> list[Any]:
        return [trial["outcome"].get("metrics") for trial in self.trials]


def left(folder: Path) -> Left:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ddpm-ray").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = (run for run in runs if run not in children)
    files = sorted((folder / "runs/quick/trials").glob("*.json"))
    return Left([checksummed_json.read(str(file)) for file in files], parent, children, client)


def sweep(folder: Path, *arguments: str) -> Job:
    return Job(folder, (*TINY, *arguments), "sweep.py", "sweep/quick.yaml")


def test_a_trial_that_diverges_fails_alone(tmp_path: Path) -> None:
    job = sweep(tmp_path, MIXED, "stopping.kind=none").run()
    assert job.code == 3, job.reported
    found = left(tmp_path)
    statuses = [trial["status"] for trial in found.trials]
    assert statuses == ["finished", "failed", "pruned"]
    reason = found.trials[1]["reason"]
    assert "the gradient's norm is" in reason
    assert "1 of 3 trials failed" in job.lines[-1]
    assert "\n           1 failed" in job.reported  # its row of the table
    assert job.result["trials"]["failed"] == 1
    statuses = sorted(run.info.status for run in found.children)
    assert statuses == ["FAILED", "FINISHED", "KILLED"]  # the last one: pruned
    (failed,) = (run for run in found.children if run.info.status == "FAILED")
    assert reason in failed.data.tags.values()
    assert found.parent.info.status == "FINISHED"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("unbroken")
    job = sweep(folder, FOUR, "stopping.kind=none").run()
    assert job.code == 0, job.reported
    return left(folder)


def same(found: Left, unbroken: Left) -> None:
    """Each trial once, to its end, with the same scores, each step once, nothing still RUNNING."""
    assert [trial["status"] for trial in found.trials] == ["finished"] * 4
    assert found.scores == unbroken.scores
    assert [run.info.status for run in found.children] == ["FINISHED"] * 4
    assert found.parent.info.status == "FINISHED"
    curves = {run.info.run_name: found.curve(run) for run in found.children}
    assert curves == {run.info.run_name: unbroken.curve(run) for run in unbroken.children}
    for curve in curves.values():
        assert [step for step, _ in curve] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("over", [0, 1, 3])
def test_a_killed_sweep_ends_like_an_unbroken_one(
    over: int, unbroken: Left, tmp_path: Path
) -> None:
    """Its driver is killed before and while trials are at work; no committed step is lost."""
    broken = sweep(tmp_path, FOUR, "stopping.kind=none")
    broken.run(at=over, strike=lambda pid: os.kill(pid, signal.SIGKILL))
    assert broken.code == -signal.SIGKILL
    again = sweep(tmp_path, FOUR, "stopping.kind=none").run()
    assert again.code == 0, again.reported
    same(left(tmp_path), unbroken)


def kill_a_trial(driver: int) -> None:
    """The processes in which Tune runs trials' functions; one of them may just have ended one."""
    processes = psutil.Process(driver).children(recursive=True)
    drivers = [one for one in processes if command_of(one).startswith("ray::ImplicitFunc.train")]
    assert drivers
    for one in drivers:
        one.kill()


@pytest.mark.slow
def test_a_killed_trial_is_started_again_in_the_same_sweep(unbroken: Left, tmp_path: Path) -> None:
    """The sweep would hang at its end if the dead one's workers kept their place."""
    job = sweep(tmp_path, FOUR, "stopping.kind=none").run(at=1, strike=kill_a_trial)
    assert job.code == 0, job.reported
    found = left(tmp_path)
    assert sum(trial["losses"] for trial in found.trials) in (1, 2)
    same(found, unbroken)


@pytest.mark.slow
def test_ctrl_c_commits_checkpoints_and_the_same_command_continues(
    unbroken: Left, tmp_path: Path
) -> None:
    stopped = sweep(tmp_path, FOUR, "stopping.kind=none")
    stopped.run(at=1, strike=lambda pid: os.kill(pid, signal.SIGINT))
    assert stopped.code == 130, stopped.reported
    assert "the same command continues" in stopped.lines[-1]
    assert {run.info.status for run in left(tmp_path).children} <= {"FINISHED", "KILLED"}
    again = sweep(tmp_path, FOUR, "stopping.kind=none").run()
    assert again.code == 0, again.reported
    same(left(tmp_path), unbroken)


@pytest.mark.slow
def test_autoencoders_are_ranked_by_their_psnr_and_none_becomes_a_champion(tmp_path: Path) -> None:
    job = Job(
        tmp_path,
        (
            "name=quick",
            "space=[{autoencoder.latent_channels: [1, 4], autoencoder.channel_mults: [[1, 2]]}]",
            "run.data.url=data/digits",
            "run.data.source=digits",
            "run.evaluation.held_out_url=",
            "run.evaluation.num_images=64",
            "run.autoencoder.base_channels=8",
            "run.autoencoder.groups=4",
            "run.training.steps=60",
            "run.training.grid_every_steps=60",
            "run.training.warmup_steps=5",
            "run.cluster.num_workers=1",
        ),
        "sweep.py",
        "sweep/autoencoders.yaml",
    ).run()
    assert job.code == 0, job.reported
    found = left(tmp_path)
    assert [trial["status"] for trial in found.trials] == ["finished"] * 2
    psnr = [trial["outcome"]["metrics"]["eval/psnr"] for trial in found.trials]
    best = psnr.index(max(psnr))
    assert job.result["winner"]["trial"] == best
    assert job.result["champion"] is None
    assert found.parent.data.metrics["sweep/best"] == max(psnr)
    for trial in found.trials:
        assert trial["outcome"]["core_s"] > 0
        assert Path(trial["outcome"]["samples"]).exists()


@pytest.mark.slow
def test_pixels_and_latents_are_compared_after_equal_core_seconds(tmp_path: Path) -> None:
    encode_noise(tmp_path, images=64)
    job = sweep(
        tmp_path,
        "space=[{data.url: [latents, pixels]}]",
        "stopping.kind=none",
        "run.data.source=",
        "run.evaluation.reference_url=pixels",
        "run.training.core_seconds=3",
        "run.training.steps=100000",
        "run.cluster.num_workers=2",
        "trials_at_once=1",
    ).run()
    assert job.code == 0, job.reported
    found = left(tmp_path)
    assert [trial["status"] for trial in found.trials] == ["finished"] * 2
    for trial in found.trials:
        assert 3 <= trial["outcome"]["core_s"] < 6  # at most a second of two workers more
        assert 0 < trial["outcome"]["step"] < 100_000
    of = {trial["values"]["data.url"]: trial["outcome"]["metrics"] for trial in found.trials}
    assert "eval/fd_digits_ceiling" in of["latents"]
    assert "eval/fd_digits_ceiling" not in of["pixels"]
