"""Paint a part of an image anew, paint around it, or vary it, by a trained model.

    python jobs/edit.py MODEL_URI IMAGE --mask MASK --out edited.png [key=value ...]
    python jobs/edit.py MODEL_URI IMAGE --out edited.png kind=outpaint right=16 [key=value ...]

MODEL_URI and `sampling` keys are as in jobs/sample.py; method=repaint samples with
the sampler ancestral by default. White pixels of MASK are repainted; dark ones keep their values.
Where MASK has transparent pixels, its opaque ones must be all white (they are repainted) or all
dark (the transparent ones are). MASK is as large as IMAGE, and IMAGE at least as large as the
model's. Options: --help, --print-config. The last line of stdout is a JSON object with the results.
"""

import sys
import time
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import home_folder, main
from ddpm_ray.config.edit import EditConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.output_files import input_file, made_ready, output_file


def prepare(config: EditConfig, arguments: Namespace) -> EditConfig:
    """The config as the run has it where nothing else was given; absolute paths."""
    if problems := list(config.argument_errors(arguments.mask, arguments.out)):
        raise ConfigError("\n".join(problems))
    home = home_folder()
    arguments.out = output_file("--out", arguments.out, home, (".png",))
    arguments.image = input_file("image", arguments.image, home)
    arguments.mask = arguments.mask and input_file("--mask", arguments.mask, home)
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.model_uri = resolve_model_uri(arguments.model_uri, home)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(config, arguments.model_uri, arguments.given, home)


def edit(config: EditConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the picture is, how well what is new fits, and what it was painted by."""
    made_ready(arguments.out)
    from ddpm_ray.assembly.edit import edited_files
    from ddpm_ray.data.packing.image_files import from_pixels
    from ddpm_ray.runs import load_model
    from ddpm_ray.sampling.image_grid import grid
    from ddpm_ray.sampling.image_io import write_picture

    model = load_model.load(arguments.model_uri, home=home_folder())
    started = time.perf_counter()
    images, measured = edited_files(config, model, arguments.image, arguments.mask)
    write_picture(arguments.out, grid(images) if len(images) > 1 else from_pixels(images[0], 0))
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    seconds = round(time.perf_counter() - started, 3)
    return {"picture": arguments.out, **measured, "seconds": seconds, **provenance}


if __name__ == "__main__":
    names = "model_uri", "image", "--mask?", "--out"
    sys.exit(main(__doc__ or "", EditConfig, edit, *names, prepare=prepare))
