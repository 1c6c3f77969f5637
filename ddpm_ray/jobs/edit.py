"""Repaint a part of an image, extend it, vary it or enlarge it with a trained model.

    ddpm-ray edit MODEL_URI IMAGE --mask MASK --out edited.png [key=value ...]
    ddpm-ray edit MODEL_URI IMAGE --out wide.png kind=outpaint right=16 [key=value ...]
    ddpm-ray edit MODEL_URI IMAGE --out b.png kind=text_diff from_text=TEXT to_text=TEXT
    python jobs/edit.py MODEL_URI IMAGE --mask MASK --out edited.png [key=value ...]

White pixels of MASK are repainted, dark pixels are kept. If MASK has transparent pixels, its opaque
pixels must be all white (they are repainted) or all dark (the transparent ones are). MASK has the
size of IMAGE; IMAGE is at least as large as the model's images. Options of the group `sampling`
default to those that the model was trained with; method=repaint, the default for models without
objective.inpainting_masks, uses the sampler ancestral.
"""

import time
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, input_file, made_ready, output_file
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.jobs.model_argument import MODEL_URI, shown_provenance, with_settings_of_model
from ddpm_ray.jobs.prompts import prompts_facts, with_prompts_of_file


def prepare(config: EditConfig, arguments: Namespace) -> EditConfig:
    """Return `config` with absolute paths and the model's own sampling settings."""
    if problems := list(config.argument_errors(arguments.mask, arguments.out)):
        raise ConfigError("\n".join(problems))
    home = home_folder()
    arguments.out = output_file("--out", arguments.out, home, (".png",))
    arguments.image = input_file("image", arguments.image, home)
    arguments.mask = arguments.mask and input_file("--mask", arguments.mask, home)
    if config.kind == "text_diff" and "sampling.prompts" in arguments.given:
        raise ConfigError(
            "sampling.prompts is given and kind is 'text_diff'; leave it out and give from_text "
            "and to_text"
        )
    return with_settings_of_model(with_prompts_of_file(config, arguments), arguments)


def edit(config: EditConfig, arguments: Namespace) -> dict[str, Any]:
    """Edit the image, write the result, and return where it is and how well it fits."""
    made_ready(arguments.out)
    from ddpm_ray.assembly.edit import edited_files
    from ddpm_ray.data.packing.image_files import from_pixels
    from ddpm_ray.runs import load_model
    from ddpm_ray.sampling.image_grid import grid
    from ddpm_ray.sampling.image_io import write_picture

    model = load_model.load_to_draw(
        arguments.model_uri,
        home=home_folder(),
        autoencoder=config.autoencoder,
        text_model=config.text_model,
    )
    started = time.perf_counter()
    images, measured = edited_files(config, model, arguments.image, arguments.mask)
    write_picture(arguments.out, grid(images) if len(images) > 1 else from_pixels(images[0], 0))
    provenance = shown_provenance(model.provenance)
    drawn = prompts_facts(arguments)
    seconds = round(time.perf_counter() - started, 3)
    return {"picture": arguments.out, **measured, **drawn, "seconds": seconds, **provenance}


ARGUMENTS = (
    MODEL_URI,
    Argument("image", "image file to edit"),
    Argument("--mask", "kind=inpaint: image file of the mask", required=False),
    Argument("--out", "PNG file to write"),
)
JOB = Job("edit", __doc__ or "", EditConfig, edit, ARGUMENTS, prepare)
