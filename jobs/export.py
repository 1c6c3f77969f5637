"""Give a trained model to diffusers, as a folder that its own from_pretrained reads.

    python jobs/export.py MODEL_URI --out FOLDER [key=value ...]

MODEL_URI is as in jobs/sample.py. FOLDER holds the U-Net of the EMA weights and the scheduler that
it was trained under; ddpm_ray.load reads it as well. Options: --help, --print-config. The last line
of stdout is a JSON object with the results.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_ray.command_line import main
from ddpm_ray.job_config import ExportConfig


def export(config: ExportConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the folder is, and which weights are in it."""
    from ddpm_ray import build_trained, load  # heavy: after the config is checked

    model = load(arguments.model_uri)
    build_trained.write_diffusers(model, config.sampling, Path(arguments.out))
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    return {"folder": arguments.out, **provenance}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", ExportConfig, export, "model_uri", "--out"))
