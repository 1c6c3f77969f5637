"""Score a trained model against a data set: FID, KID, each with the protocol it was taken under.

    python jobs/evaluate.py MODEL_URI [key=value ...]

MODEL_URI is a run's folder or one checkpoint's, runs:/<run id>/model or models:/<name>@<alias>.
Samples are drawn by the run's own `sampling` keys; a key given here replaces the run's.
Options: --help, --print-config. The last line of stdout is a JSON object with the results.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import home_folder, main
from ddpm_ray.config.jobs import EvaluateConfig


def prepare(config: EvaluateConfig, arguments: Namespace) -> EvaluateConfig:
    """The config as the run has it where nothing else was given; absolute paths."""
    home = home_folder()
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.model_uri = resolve_model_uri(arguments.model_uri, home)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(config, arguments.model_uri, arguments.given, home)


def evaluate(config: EvaluateConfig, arguments: Namespace) -> dict[str, Any]:
    """Metrics and their provenance."""
    from ddpm_ray.runs.evaluate import evaluate as run  # heavy: after the config is read

    return run(arguments.model_uri, config, home_folder())


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", EvaluateConfig, evaluate, "model_uri", prepare=prepare))
