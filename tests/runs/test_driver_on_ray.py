"""A real driver: its terminal is closed, or a worker freezes at start-up."""

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ddpm_ray.storage import checksummed_json
from tests.limits import JOB_S
from tests.runs.job import ROOT, TINY_RUN, Job

STEPS = 4000  # more than it comes to
LONG = (
    *TINY_RUN,
    f"training.steps={STEPS}",
    "training.log_every_steps=5",
    "training.checkpoint_every_steps=4000",
    "training.grid_every_steps=0",
)
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(JOB_S + 100),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def test_a_closed_terminal_commits_a_checkpoint_and_leaves_nothing(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    (tmp_path / "scratch").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "scratch")}
    environment["RAY_TMPDIR"] = "/tmp"  # its sockets need short paths
    environment.pop("MLFLOW_TRACKING_URI", None)
    script = (
        "import fcntl, runpy, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); "
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    job, config = str(ROOT / "jobs/train.py"), str(ROOT / "conf/train/digits.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", script, job, config, *LONG],
        cwd=tmp_path,
        env=environment,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    limit = threading.Timer(JOB_S, process.kill)
    limit.start()
    try:
        said = b""
        while b"loss" not in said:
            try:
                said += os.read(terminal, 10_000)
            except OSError:  # nobody has it open any more
                pytest.fail(said[-2000:].decode())
        os.close(terminal)  # all of its processes get SIGHUP
        code = process.wait()
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    assert code == 129, said[-2000:].decode()
    pointer = checksummed_json.read(str(tmp_path / "runs/digits/checkpoints/latest.json"))
    reached = int(pointer["checkpoints"][0]["folder"].split("-")[1])
    assert 0 < reached < STEPS
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert run.info.status == "KILLED"
    assert not list((tmp_path / "scratch").glob("ddpm-ray-train-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "point, said",
    [  # in the process group's making the others wait, for cluster.timeout_s
        ("join", r"worker 1 \(process \d+ on \S+\) has not started: no heartbeat for "),
        (
            "open",
            r"worker 1 sent no heartbeat for .* at start-up, before the data set is open",
        ),
    ],
)
def test_a_worker_frozen_as_it_starts_is_named_and_the_run_goes_on(
    point: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_RAY_FAULTS", f"{tmp_path / 'fired'} freeze@{point}:0/1")
    short = ("training.steps=20", "training.checkpoint_every_steps=20")
    job = Job(tmp_path, (*LONG, *short, "cluster.stall_timeout_s=10")).run()
    assert job.code == 0, job.reported
    (line,) = [line for line in job.lines if "restarting the worker group" in line]
    assert re.search(said, line)
