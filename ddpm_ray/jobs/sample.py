"""Draw images from a trained model and save them as one grid.

    ddpm-ray sample MODEL_URI --out grid.png [key=value ...]
    python jobs/sample.py MODEL_URI --out grid.png [key=value ...]

MODEL_URI may also be the folder of a cascade (`ddpm-ray cascade`), or one in MLflow.
Options of the group `sampling` default to those that the model was trained with.
"""

import itertools
from argparse import Namespace
from dataclasses import replace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import PICTURES, home_folder, made_ready, output_file
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.jobs.model_argument import MODEL_URI, shown_provenance, with_settings_of_model
from ddpm_ray.jobs.prompts import prompts_facts, with_prompts_of_file


def prepare(config: SampleConfig, arguments: Namespace) -> SampleConfig:
    """Return `config` with absolute paths and the model's own sampling settings."""
    home = home_folder()
    arguments.out = output_file("--out", arguments.out, home, PICTURES)
    gif = config.gif and output_file("gif", config.gif, home, (".gif",))
    strip = config.strip and output_file("strip", config.strip, home, PICTURES)
    config = with_prompts_of_file(replace(config, gif=gif, strip=strip), arguments)
    return with_settings_of_model(config, arguments)


def sample(config: SampleConfig, arguments: Namespace) -> dict[str, Any]:
    """Draw the images, write the grid, the GIF and the strip, and return where they are."""
    made_ready(arguments.out, config.gif, config.strip)
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.runs import load_model
    from ddpm_ray.sampling import gif, image_grid, image_io
    from ddpm_ray.sampling.cascade import Cascade

    settings, home = config.sampling, home_folder()
    uri, moved = arguments.model_uri, (config.autoencoder, config.text_model)
    model = load_model.load_to_draw(uri, None, home, *moved)
    if isinstance(model, Cascade) and not settings.prompts:
        raise ConfigError(
            f"sampling.prompts is empty, and {uri} holds a cascade, which draws images of texts: "
            f"give one or more, as in sampling.prompts=[a red apple]"
        )
    if config.strip and isinstance(model, Cascade):
        raise ConfigError(f"strip is {config.strip}, but {uri} holds a cascade: leave it out")
    model = load_model.configured(model, settings, config.guidance, home=home)
    image_grid.require_memory("num_images", config.num_images, model.drawn_shape)
    calls = -(-config.num_images // settings.batch_size) * (len(model.timesteps) - 1)
    line, film, seen = (
        ProgressLine(f"step of {settings.sampler}"),
        gif.Film(model.denoiser.codec),
        itertools.count(1),
    )

    def show(t: int, x_t: Any, x_0: Any) -> None:
        line(next(seen), calls)
        if config.gif:
            film.add(t, x_t, x_0)

    images = model.sample(config.num_images, on_step=show)
    image_io.write_picture(arguments.out, image_grid.grid_of_samples(images, settings.prompts))
    if config.gif:
        film.save(config.gif, images)
    if config.strip:
        image_io.write_picture(config.strip, image_grid.strip_of(model, config.num_images))
    provenance = shown_provenance(model.provenance)
    drawn = prompts_facts(arguments)
    return {"picture": arguments.out, "num_images": config.num_images, **drawn, **provenance}


OUT = Argument("--out", f"image file to write: {', '.join(PICTURES)}")
JOB = Job("sample", __doc__ or "", SampleConfig, sample, (MODEL_URI, OUT), prepare)
