"""Score a trained model against a data set: FID, KID and others, each with its protocol.

    ddpm-ray evaluate MODEL_URI [key=value ...]
    python jobs/evaluate.py MODEL_URI [key=value ...]

MODEL_URI may also be an autoencoder, as a run or as a diffusers folder of an AutoencoderKL: its
reconstructions are scored by PSNR, SSIM, rFID and KL. A run with task=contrastive is scored by
retrieval, on its held-out data, and a folder of `ddpm-ray cascade` by the images of its last stage.
A folder of diffusers needs data_url=.
Options of the group `sampling` default to those that the model was trained with.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Job
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.jobs.model_argument import MODEL_URI, with_settings_of_model
from ddpm_ray.jobs.unused_options import warn_of_options_of_runs


def evaluate(config: EvaluateConfig, arguments: Namespace) -> dict[str, Any]:
    """Return the scores and their provenance."""
    from ddpm_ray.cli.progress import image_line

    # Heavy: imported after the config is checked.
    from ddpm_ray.runs.evaluation.evaluate import run_evaluation

    warn_of_options_of_runs(config.evaluation)
    return run_evaluation(arguments.model_uri, config, home_folder(), image_line())


JOB = Job("evaluate", __doc__ or "", EvaluateConfig, evaluate, (MODEL_URI,), with_settings_of_model)
