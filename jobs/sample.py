"""Draw images from a trained model into one picture.

    python jobs/sample.py MODEL_URI --out grid.png [key=value ...]

MODEL_URI is a run's folder or one checkpoint's, runs:/<run id>/model or models:/<name>@<alias>.
Images are drawn by the run's own `sampling` keys; a key given here replaces the run's.
Options: --help, --print-config. The last line of stdout is a JSON object with the results.
"""

import itertools
import sys
from argparse import Namespace
from dataclasses import replace
from typing import Any

from ddpm_ray.cli import ProgressLine, home_folder, main
from ddpm_ray.config.jobs import SampleConfig
from ddpm_ray.output_files import PICTURES, made_ready, output_file


def prepare(config: SampleConfig, arguments: Namespace) -> SampleConfig:
    """The config as the run has it where nothing else was given; absolute paths."""
    home = home_folder()
    arguments.out = output_file("--out", arguments.out, home, PICTURES)
    gif = config.gif and output_file("gif", config.gif, home, (".gif",))
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    uri = arguments.model_uri = resolve_model_uri(arguments.model_uri, home)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(replace(config, gif=gif), uri, arguments.given, home)


def sample(config: SampleConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the picture is, and what it was drawn from."""
    made_ready(arguments.out, config.gif)
    from ddpm_ray.runs import load_model
    from ddpm_ray.sampling import gif, image_grid, image_io

    uri, home = arguments.model_uri, home_folder()
    model, plan = load_model.planned(uri, config.sampling, config.guidance, home)
    size = config.sampling.batch_size
    calls = -(-config.num_images // size) * (len(plan.steps) - 1)
    line, film, seen = ProgressLine(f"step of {plan.sampler}"), gif.Film(), itertools.count(1)

    def show(t: int, x_t: Any, x_0: Any) -> None:
        line(next(seen), calls)
        if config.gif:
            film.add(t, x_t, x_0)

    images = model.draw(plan, config.num_images, size, show)
    image_io.write_picture(arguments.out, image_grid.grid(images))
    if config.gif:
        film.save(config.gif, images)
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    return {"picture": arguments.out, "num_images": config.num_images, **provenance}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", SampleConfig, sample, "model_uri", "--out", prepare=prepare))
