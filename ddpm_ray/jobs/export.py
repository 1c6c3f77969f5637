"""Export a trained model to a folder that the library diffusers loads.

    ddpm-ray export MODEL_URI --out FOLDER [key=value ...]
    python jobs/export.py MODEL_URI --out FOLDER [key=value ...]

FOLDER receives the U-Net with its EMA weights and the scheduler of diffusers that samples as the
run does; `ddpm_ray.load` reads it as well. A line on stderr names the settings that diffusers has
no equivalent for; the result names the pipeline of diffusers and the arguments to call it with.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_folder
from ddpm_ray.config.jobs import ExportConfig
from ddpm_ray.jobs.model_argument import MODEL_URI, with_settings_of_model


def prepare(config: ExportConfig, arguments: Namespace) -> ExportConfig:
    """Return `config` with absolute paths and the model's own sampling settings."""
    arguments.out = output_folder("--out", arguments.out, home_folder())
    return with_settings_of_model(config, arguments)


def export_model(config: ExportConfig, arguments: Namespace) -> dict[str, Any]:
    """Write the folder, and return how diffusers samples from it and which weights it holds."""
    from ddpm_ray.assembly import checkpoint_loading  # heavy: after the config is checked
    from ddpm_ray.runs import load_model

    model = load_model.load(arguments.model_uri, home=home_folder(), autoencoder=config.autoencoder)
    export = checkpoint_loading.write_diffusers(model, config.sampling, Path(arguments.out))
    missing = "; ".join(export.no_equivalent) or "nothing"
    print(f"without an equivalent in diffusers: {missing}", file=sys.stderr)
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    how = {
        "pipeline": export.pipeline,
        "scheduler": export.scheduler["_class_name"],
        "call": export.call,
        "no_equivalent": list(export.no_equivalent),
    }
    return {"folder": arguments.out, **how, **provenance}


OUT = Argument("--out", "folder to write")
JOB = Job("export", __doc__ or "", ExportConfig, export_model, (MODEL_URI, OUT), prepare)
