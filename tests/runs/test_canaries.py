"""Secrets planted in the environment of a whole run appear in nothing that it leaves behind.

The run is what a driver does, with its one worker in the same process instead of on Ray: data and
checkpoints in a bucket, MLflow on SQLite, the model logged. Every byte of them is then searched.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import serving_s3
from tests.noise import pack_noise

ROOT = Path(__file__).parents[2]
CANARY = "canary/5f3c+{}"  # with what URLs and JSON spell otherwise
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "GITHUB_TOKEN",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "PGPASSWORD",
)

SCRIPT = """
import os, sys
from pathlib import Path
from ddpm_ray.cli.job import Job
from ddpm_ray.cli.main import main
from ddpm_ray.distributed import worker_group as group
from ddpm_ray.runs import train as training_run
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.runs.train_worker import assemble
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.loading import from_dict
from ddpm_ray.training.loop import train_loop
from ddpm_ray.reporting import Command
from ddpm_ray.collectives import Workers

def alone(worker, settings, *_):
    config = from_dict(RunConfig, settings["config"])
    run = assemble(config, settings, lambda _: Command.NONE, Workers())
    try:
        train_loop(run)
    finally:
        run.stream.close()
    assert run.sink.close(60) == 0
    return {"step": run.state.step, "finished": run.is_finished(), "core_seconds": run.log.core_s,
            "checkpoint": run.checkpoints.committed, "scores": {},
            "validation_losses": run.state.validation_losses, "undelivered": 0,
            "trained_from": 0, "trained_to": 1}

def fails(*_):
    raise RunFailedError(f"worker 0: no answer from {os.environ['PLANTED_URL']}")

def job(config, _):
    group.run = fails if config.name == "fails" else alone
    return training_run.run_training(config, Path.cwd(), lambda _: None).report

keys = sys.argv[1:]
for name, expected in (("public-runs", 0), ("fails", 1)):
    sys.argv[1:] = [f"name={name}", *keys]
    assert main(Job("train", "", RunConfig, job)) == expected
"""
TINY = (
    "schedule.num_steps=20",
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "training.steps=4",
    "training.checkpoint_every_steps=2",
    "training.global_batch_size=8",
    "sampling.steps=2",
    "training.log_every_steps=2",
    "training.grid_every_steps=2",
    "evaluation.num_images=16",
    "evaluation.features=digits",
    "evaluation.kernel_distance_images=8",
    "evaluation.validation_every_steps=2",
    "evaluation.validation_images=16",
    "sampling.batch_size=8",
    "data.url=s3://bucket/noise",
    "storage=s3://bucket/runs",
)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The endpoint of a store whose secret key is a canary, and the folder that it keeps."""
    folder = tmp_path / "s3"
    folder.mkdir()
    secret = CANARY.format("AWS_SECRET_ACCESS_KEY")
    with serving_s3(folder, "AKIAPLANTED", secret) as endpoint:
        yield endpoint, folder


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """That of a user who has a secret for everything."""
    ours = ("AWS_", "MLFLOW_", "RAY_", "DDPM_RAY_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    planted = {name: CANARY.format(name) for name in SECRETS}
    submitted = {"job_submission_id": "raysubmit_1"}
    job = {"metadata": submitted, "runtime_env": {"env_vars": planted}}
    return (
        inherited
        | planted
        | {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
            "AWS_REGION": "us-east-1",
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job),
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PLANTED_URL": f"http://me:{CANARY.format('url')}@mlflow.example.com",
        }
    )


def repository(folder: Path) -> None:
    """A repository whose remote has a token in its address, as many have."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example"]
    address = f"https://me:{CANARY.format('git')}@github.com/me/x"
    for words in (
        ["init", "-q"],
        ["commit", "-q", "--allow-empty", "-m", "a"],
        ["remote", "add", "origin", address],
    ):
        subprocess.run([*git, *words], cwd=folder, check=True)


def spellings(secret: str) -> list[bytes]:
    """As it stands, in a URL, in JSON, and in base64 at each of the three offsets."""
    plain = secret.encode()
    shifted = [base64.b64encode(b"\0" * n + plain)[4 if n else 0 : -4] for n in range(3)]
    return [plain, quote(secret, safe="").encode(), secret.replace("/", "\\/").encode(), *shifted]


def holders(folder: Path, text: bytes) -> list[str]:
    """Files below `folder` that hold the bytes, in their content or their name."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if text in os.fsencode(path.name) or (path.is_file() and text in path.read_bytes())
    ]


def test_no_planted_secret_is_found_in_anything_a_run_leaves(
    bucket: tuple[str, Path], tmp_path: Path
) -> None:
    endpoint, stored = bucket
    home, clone = tmp_path / "home", tmp_path / "clone"
    home.mkdir()
    clone.mkdir()
    repository(clone)
    pack_noise(str(stored / "bucket/noise"), images=45, side=8)
    places = f"tracking.uri=sqlite:///{home / 'mlflow.db'}", f"data.cache_dir={home / 'cache'}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *TINY, *places],
        cwd=clone,
        env=environment(endpoint, home),
        capture_output=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said.decode()
    (home / "said").write_bytes(said)
    for name in (*SECRETS, "git", "url"):
        for spelling in spellings(CANARY.format(name)):
            found = [*holders(home, spelling), *holders(stored, spelling)]
            assert not found, (name, spelling, found)
    assert b"http://***@mlflow.example.com" in said  # and it was told without it
    # The search would find them: what is public is where it should be.
    kept = [*holders(home, b"public-runs"), *holders(stored, b"public-runs")]
    for place in ("mlflow.db", "config.yaml", "state.json", "run.json", "said"):
        assert any(path.endswith(place) for path in kept), (place, kept)


def test_the_search_knows_each_spelling(tmp_path: Path) -> None:
    secret = CANARY.format("x")
    for number, held in enumerate(
        [
            secret,
            quote(secret, safe=""),
            *(base64.b64encode(f"{'u' * n}{secret}:and more".encode()).decode() for n in range(6)),
        ]
    ):
        (tmp_path / str(number)).write_text(f"before {held} after")
    seen = {path for spelling in spellings(secret) for path in holders(tmp_path, spelling)}
    assert seen == {str(number) for number in range(8)}
