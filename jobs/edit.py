"""Paint a part of an image anew, paint around it, or vary it, by a trained model.

    python jobs/edit.py MODEL_URI IMAGE --mask MASK --out edited.png [key=value ...]
    python jobs/edit.py MODEL_URI IMAGE --out edited.png kind=outpaint right=16 [key=value ...]

MODEL_URI is as in jobs/sample.py. What is white in MASK is painted anew, what is black stays to the
last grey level, as diffusers and image editors have it; MASK is as large as IMAGE, and IMAGE at
least as large as the model's images. Options: --help, --print-config. The last line of stdout is a
JSON object with the results.
"""

import sys
import time
from argparse import Namespace
from typing import Any

from ddpm_ray.command_line import main
from ddpm_ray.edit_config import EditConfig


def edit(config: EditConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the picture is, how well what is new fits, and what it was painted by."""
    from ddpm_ray.knobs import ConfigError

    if problems := list(config.misgiven(arguments.mask, arguments.out)):
        raise ConfigError("\n".join(problems))
    from ddpm_ray import build_edit, load  # heavy: after the config is checked
    from ddpm_ray.data.image_files import BadImageError, from_pixels
    from ddpm_ray.generation.grids import grid
    from ddpm_ray.generation.picture_files import read_image, read_mask

    model = load(arguments.model_uri)
    started = time.perf_counter()
    try:
        image = read_image(arguments.image, model.image_shape[0])
        mask = read_mask(arguments.mask) if arguments.mask else None
        images, measured = build_edit.edited(config, model, image, mask)
    except (BadImageError, ValueError) as error:
        raise ConfigError(str(error)) from error
    picture = from_pixels(images[0], 0) if len(images) == 1 else grid(images)
    picture.save(arguments.out)
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    seconds = round(time.perf_counter() - started, 3)
    return {"picture": arguments.out, **measured, "seconds": seconds, **provenance}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", EditConfig, edit, "model_uri", "image", "--mask?", "--out"))
