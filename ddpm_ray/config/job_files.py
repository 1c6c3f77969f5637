"""Find the job that a config file belongs to, for the error of a wrong job."""

from typing import Any

from ddpm_ray.config.fault_drill import DrillConfig
from ddpm_ray.config.loading import unknown_keys
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sweep import SweepConfig

JOBS: dict[str, type[Any]] = {
    "train.py": RunConfig,
    "sweep.py": SweepConfig,
    "drill.py": DrillConfig,
}


def job_of_file(kind: type[Any], path: str) -> str:
    """Return the script in jobs/ whose config the file `path` fits better than `kind`.

    Empty if `kind` has most of its keys, or if no job does: then the file contains errors.
    """
    lacks = {script: len(unknown_keys(other, path)) for script, other in JOBS.items()}
    nearest = min(lacks, key=lambda script: lacks[script])
    own = len(unknown_keys(kind, path))
    return nearest if JOBS[nearest] is not kind and 2 * lacks[nearest] < own else ""
