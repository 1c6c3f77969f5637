"""Export a trained model to a folder that the library diffusers loads.

    ddpm-ray export MODEL_URI --out FOLDER [key=value ...]
    python jobs/export.py MODEL_URI --out FOLDER [key=value ...]

The job writes FOLDER, which is new or empty: the network with its EMA weights (`average` in the
result names another average), and the scheduler of diffusers that samples as the run does. Then
`ddpm_ray.load` reads FOLDER, too. Optimizer state, other EMAs and the training data's name are not
exported. A line on stderr names the settings that have no equivalent in diffusers; the result names
the pipeline of diffusers and the arguments of its call.

A model of latents is written with its autoencoder. The standardisation of the latents is folded
into the autoencoder's 1x1 convolutions, so that scaling_factor is 1. MODEL_URI may also be the run
of an autoencoder: FOLDER is then an AutoencoderKL. Of a model of texts FOLDER has the text encoder,
tokenizer, scheduler and autoencoder, and with the network of Stable Diffusion it is the folder of a
StableDiffusionPipeline (docs/text.md).
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, new_folder
from ddpm_ray.config.jobs.export import ExportConfig
from ddpm_ray.jobs.model_argument import MODEL_URI, with_settings_of_model


def prepare(config: ExportConfig, arguments: Namespace) -> ExportConfig:
    """Return `config` with absolute paths and the model's own sampling settings."""
    arguments.out = new_folder("--out", arguments.out, home_folder())
    return with_settings_of_model(config, arguments)


def export_model(config: ExportConfig, arguments: Namespace) -> dict[str, Any]:
    """Write the folder; return how diffusers samples from it and which weights it holds."""
    from ddpm_ray.runs.export import export_run  # heavy: after the config is checked

    out, home = Path(arguments.out), home_folder()
    result = export_run(arguments.model_uri, config, arguments.given, out, home)
    missing = "; ".join(result["no_equivalent"]) or "nothing"
    print(f"without an equivalent in diffusers: {missing}", file=sys.stderr)
    return result


OUT = Argument("--out", "folder to write, new or empty")
JOB = Job("export", __doc__ or "", ExportConfig, export_model, (MODEL_URI, OUT), prepare)
