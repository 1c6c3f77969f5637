"""Find the width of weight average with the best samples, of a run that kept some on its way.

    python jobs/average.py RUN [--out FOLDER] [widths=[0.05,0.1,0.15]] [key=value ...]

RUN is the folder of a run with training.ema_snapshot_every_steps above 0. Each width is made of
what was kept, without training, and scored as by jobs/evaluate.py; the best goes into FOLDER, as a
checkpoint that other jobs take for MODEL_URI. Options: --help, --print-config. The last line of
stdout is a JSON object with the results.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import home_folder, main
from ddpm_ray.config.ema_search import AverageConfig
from ddpm_ray.output_files import output_folder


def prepare(config: AverageConfig, arguments: Namespace) -> AverageConfig:
    """The config as the run has it where nothing else was given; absolute paths."""
    home = home_folder()
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.run = resolve_model_uri(arguments.run, home)
    if arguments.out and "://" not in arguments.out:
        arguments.out = output_folder("--out", arguments.out, home)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(config, arguments.run, arguments.given, home)


def average(config: AverageConfig, arguments: Namespace) -> dict[str, Any]:
    """Scores by width, and the best of them."""
    from ddpm_ray.runs.ema_search import search  # heavy: after the config is read

    return search(arguments.run, config, home_folder(), arguments.out)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", AverageConfig, average, "run", "--out?", prepare=prepare))
