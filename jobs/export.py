"""Give a trained model to diffusers, as a folder that its own from_pretrained reads.

    python jobs/export.py MODEL_URI --out FOLDER [key=value ...]

MODEL_URI is as in jobs/sample.py. FOLDER holds the U-Net of the EMA weights and the scheduler of
diffusers that walks as the run samples; ddpm_ray.load reads it as well. A line on stderr says what
diffusers has no equivalent for, the result which pipeline to call with which arguments.
Options: --help, --print-config. The last line of stdout is a JSON object with the results.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_ray.cli import home_folder, main
from ddpm_ray.config.jobs import ExportConfig
from ddpm_ray.output_files import output_folder


def prepare(config: ExportConfig, arguments: Namespace) -> ExportConfig:
    """The config as the run has it where nothing else was given; absolute paths."""
    home = home_folder()
    arguments.out = output_folder("--out", arguments.out, home)
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.model_uri = resolve_model_uri(arguments.model_uri, home)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(config, arguments.model_uri, arguments.given, home)


def export_model(config: ExportConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the folder is, how diffusers samples from it, and which weights are in it."""
    from ddpm_ray.assembly import checkpoint_loading  # heavy: after the config is checked
    from ddpm_ray.runs import load_model

    model = load_model.load(arguments.model_uri, home=home_folder())
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


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", ExportConfig, export_model, "model_uri", "--out", prepare=prepare))
