"""Find the EMA width with the best samples, for a run that saved EMA snapshots.

    ddpm-ray average RUN [--out FOLDER] [widths=[0.05,0.1,0.15]] [key=value ...]
    python jobs/average.py RUN [--out FOLDER] [widths=[0.05,0.1,0.15]] [key=value ...]

RUN was trained with training.ema_snapshot_every_steps above 0. The weights of each width are
computed from its snapshots, without training, and scored as by the job evaluate. FOLDER receives
the best weights as a checkpoint, which other jobs take as MODEL_URI.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url
from ddpm_ray.config.jobs.ema_search import AverageConfig
from ddpm_ray.jobs.model_argument import with_settings_of_model
from ddpm_ray.jobs.unused_options import warn_of_options_of_runs


def prepare(config: AverageConfig, arguments: Namespace) -> AverageConfig:
    """Return `config` with absolute paths and the run's own sampling settings."""
    home = home_folder()
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.run = resolve_model_uri(arguments.run, home)
    arguments.out = arguments.out and output_url("--out", arguments.out, home)
    return with_settings_of_model(config, arguments, "run")


def average(config: AverageConfig, arguments: Namespace) -> dict[str, Any]:
    """Return the scores of each width, and the best width."""
    from ddpm_ray.cli.progress import image_line
    from ddpm_ray.runs.evaluation.ema_search import search  # heavy: after the config is checked

    warn_of_options_of_runs(config.evaluation)
    return search(arguments.run, config, home_folder(), arguments.out, image_line())


ARGUMENTS = (
    Argument("run", "folder or fsspec URL of the run"),
    Argument("--out", "folder or fsspec URL to write the best weights to", required=False),
)
JOB = Job("average", __doc__ or "", AverageConfig, average, ARGUMENTS, prepare)
