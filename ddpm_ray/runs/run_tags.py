"""MLflow tags of a run: user, versions of packages, commit, job, data set."""

import getpass
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddpm_ray.assembly.run_config import changes_text
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.redaction import sanitize
from ddpm_ray.tracking.mlflow_runs import MAX_TAG

PACKAGES = ("ddpm-ray", "torch", "ray", "mlflow", "numpy", "pyarrow", "fsspec")


def run_tags(dataset: Dataset) -> dict[str, str]:
    """MLflow tags: user, versions, commit, job, data set."""
    # Ray sets it in the driver of a submitted job only.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return {
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.source.type": "JOB",
        "mlflow.user": user_name(),
        "git_commit": git_commit(Path(__file__).parent),
        "data_fingerprint": dataset.fingerprint,
        "ray_job_id": submitted.get("job_submission_id", "none: not submitted as a job"),
        "python": platform.python_version(),
        **{f"version.{name}": version(name) for name in PACKAGES},
    }


def history_tags(history: Mapping[str, Any]) -> dict[str, str]:
    """MLflow tags of initial weights and changes; parameters of MLflow could not be updated.

    `history` is as from `run_config.run_history`.
    """
    tags = {}
    if source := history.get("init_from"):
        tags["init_from"] = sanitize(f"{source['checkpoint']} {source['ema']}")
        tags["init_from_sha256"] = source["sha256"]
    if made := history.get("changes"):
        tags["changes"] = changes_text(made)[-MAX_TAG:]
    return tags


def user_name() -> str:
    """Name of the user; `uid 1000710000` if the system has none, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError: Python 3.13 and later
        return f"uid {os.getuid()}"


def git_commit(folder: Path) -> str:
    """Commit checked out at `folder`, with `-dirty` if files differ; else $GIT_COMMIT or `unknown`.

    The working directory of a submitted Ray job has no .git.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT", "unknown")
