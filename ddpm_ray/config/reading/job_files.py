"""Find the job that a config file belongs to, for the error of a wrong job."""

from typing import Any

from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.reading.shipped import config_file, folder_of
from ddpm_ray.config.reading.sources import unknown_keys
from ddpm_ray.config.run import RunConfig

KINDS: tuple[type[Any], ...] = (RunConfig, SweepConfig, DrillConfig)  # of jobs that read a file


def job_of_file(kind: type[Any], given: str) -> str:
    """Return the job whose config the file `given` fits better than `kind`.

    Empty if `kind` has most of its keys, or if no job does: then the file contains errors.
    """
    file = str(config_file(kind, given))
    unknown = {other: len(unknown_keys(other, file)) for other in (kind, *KINDS)}
    nearest = min(KINDS, key=lambda other: unknown[other])
    fits = nearest is not kind and 2 * unknown[nearest] < unknown[kind]
    return folder_of(nearest) if fits else ""
