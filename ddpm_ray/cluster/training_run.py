"""One training run seen from its driver: check, find where it stands, run the workers, tell."""

import contextlib
import dataclasses
import getpass
import json
import logging
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddpm_ray import build
from ddpm_ray.cluster import group, tracking
from ddpm_ray.cluster.packing import pack
from ddpm_ray.cluster.trained import tracking_place
from ddpm_ray.cluster.worker import train_worker
from ddpm_ray.config import PackConfig, RunConfig
from ddpm_ray.data import storage
from ddpm_ray.data.shards import MANIFEST, Dataset, open_dataset
from ddpm_ray.knobs import ConfigError, flat, to_dict, to_yaml
from ddpm_ray.training.gallery import picture_url
from ddpm_ray.training.reporting import Progress

log = logging.getLogger(__name__)

IDENTITY = "run.json"  # in the run's folder: who it is and the config that it began with
# MLflow writes a run's parameters above each of its pictures, so that more of them than these push
# the pictures out of sight; the whole config is the artifact config.yaml.
PARAMS = (
    "schedule.kind",
    "schedule.num_steps",
    "model.base_channels",
    "training.global_batch_size",
    "training.learning_rate",
)
PACKAGES = ("ddpm-ray", "torch", "ray", "mlflow", "numpy", "pyarrow", "fsspec")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a training run leaves behind, or how far it came."""

    finished: bool
    report: dict[str, Any]  # plain JSON, with URLs of everything


def train(config: RunConfig, home: Path, show: Callable[[Progress], None]) -> Outcome:
    """Train, or continue, the run `config.name`; relative paths lie below `home`.

    Raises ConfigError before anything starts where the config does not fit the data or the run of
    that name, and RunFailedError, StorageError, DatasetError, CheckpointError or TrackingError.
    """
    config = located(config, home)
    if config.data.source and not storage.exists(storage.join(config.data.url, MANIFEST)):
        pack(config.data.source, config.data.url, PackConfig())
    dataset = open_dataset(config.data.url)
    _check_model(config, dataset)
    folder = storage.join(config.storage, config.name)
    identity = _identity(config, dataset, folder)
    tracked = tracking.find_or_create_run(
        config.tracking.uri, config.tracking.experiment, config.name, identity, _artifacts(config)
    )
    log.info("MLflow run %s", tracked.run_id)
    try:
        tracking.describe(
            tracked,
            params={key: flat(config)[key] for key in PARAMS},
            tags=_tags(dataset),
            config_yaml=to_yaml(config),
            dataset_url=config.data.url,
            dataset_fingerprint=dataset.fingerprint,
        )
        settings = {
            "config": to_dict(config),
            "folder": folder,
            "identity": identity,
            "tracked": vars(tracked),
        }
        ended = group.run(train_worker, settings, config.cluster, show)
        finished = ended["step"] >= config.training.steps
        if finished:
            tracking.log_model(tracked, ended["checkpoint"], "ddpm_ray.cluster.served_model")
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(tracking.TrackingError):  # `error` is what matters
            tracking.finish(tracked, status)
        raise
    tracking.finish(tracked, "FINISHED" if finished else "KILLED")
    return Outcome(finished, _report(config, folder, tracked, ended))


def located(config: RunConfig, home: Path) -> RunConfig:
    """The config with each relative place made absolute: workers run in folders of their own."""
    return dataclasses.replace(
        config,
        storage=storage.absolute(config.storage, home),
        data=dataclasses.replace(config.data, url=storage.absolute(config.data.url, home)),
        evaluation=dataclasses.replace(
            config.evaluation, weights=storage.absolute(config.evaluation.weights, home)
        ),
        tracking=dataclasses.replace(
            config.tracking, uri=config.tracking.uri or tracking_place(home)
        ),
    )


def _check_model(config: RunConfig, dataset: Dataset) -> None:
    """The network must fit the images: found out here, without memory and before Ray starts."""
    try:
        with torch.device("meta"):
            build.network(config.model, dataset.manifest.image_shape)
    except ValueError as error:
        raise ConfigError(f"model: with the images of {config.data.url}: {error}") from error


def _identity(config: RunConfig, dataset: Dataset, folder: str) -> str:
    """The run's own id: a new one in a new folder, else the one found there, if it is this run.

    Raises ConfigError with a line for each key that the run keeps for life and that differs now.
    """
    where = storage.join(folder, IDENTITY)
    if not storage.exists(where):
        identity = uuid.uuid4().hex
        begun = {
            "identity": identity,
            "config": to_dict(config),
            "data_fingerprint": dataset.fingerprint,
        }
        storage.write_bytes(where, (json.dumps(begun, indent=1) + "\n").encode())
        return identity
    begun = json.loads(storage.read_bytes(where))
    differing = build.differing_keys(config, begun["config"])
    if dataset.fingerprint != begun["data_fingerprint"]:
        differing.append(
            f"data.url holds data set {dataset.fingerprint[:12]}, but the run began with "
            f"{begun['data_fingerprint'][:12]}"
        )
    if differing:
        remedy = f"{folder} holds another run; choose another name=, or go back to its values"
        raise ConfigError("\n".join([*differing, remedy]))
    log.info("continuing run %s", folder)
    return str(begun["identity"])


def _artifacts(config: RunConfig) -> str | None:
    """Where a new experiment's files lie: beside a database; a server knows its own place."""
    if not config.tracking.uri.startswith("sqlite:///"):
        return None
    return str(Path(config.tracking.uri.removeprefix("sqlite:///")).parent / "mlartifacts")


def _tags(dataset: Dataset) -> dict[str, str]:
    # Set by Ray in a submitted job's driver, there alone.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB",
        "mlflow.user": getpass.getuser(),
        "git_commit": git_commit(Path(__file__).parent),
        "data_fingerprint": dataset.fingerprint,
        "ray_job_id": submitted.get("job_submission_id", "none: not submitted as a job"),
        "python": platform.python_version(),
        **{f"version.{name}": version(name) for name in PACKAGES},
    }


def _report(
    config: RunConfig, folder: str, tracked: tracking.TrackedRun, ended: dict[str, Any]
) -> dict[str, Any]:
    pictures, step = storage.join(folder, "pictures"), ended["step"]
    return {
        "name": config.name,
        "run_id": tracked.run_id,
        "step": step,
        "steps": config.training.steps,
        "checkpoint": ended["checkpoint"],
        "samples": picture_url(pictures, "samples", step),
        "denoising": picture_url(pictures, "denoising", step),
        "metrics": ended["scores"].get("metrics", {}),
        "tracking_uri": tracked.uri,
        "page": tracked.page,
    }


def git_commit(folder: Path) -> str:
    """The commit checked out at `folder`, `-dirty` where files differ; else $GIT_COMMIT, `unknown`.

    A submitted job's copy of the working directory has no .git.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT", "unknown")
