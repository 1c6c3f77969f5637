"""Draw images from a trained model into one picture.

    python jobs/sample.py MODEL_URI --out grid.png [key=value ...]

MODEL_URI is a run's folder or one checkpoint's, runs:/<run id>/model or models:/<name>@<alias>.
Options: --help, --print-config. The last line of stdout is a JSON object with the results.
"""

import itertools
import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.command_line import ProgressLine, main
from ddpm_ray.job_config import SampleConfig


def sample(config: SampleConfig, arguments: Namespace) -> dict[str, Any]:
    """Where the picture is, and what it was drawn from."""
    from ddpm_ray import build_diffusion, load  # heavy: after the config is checked
    from ddpm_ray.cluster.trained import led
    from ddpm_ray.config import RunConfig
    from ddpm_ray.generation.films import Film
    from ddpm_ray.generation.grids import grid
    from ddpm_ray.knobs import from_dict

    model, sampling = load(arguments.model_uri), config.sampling
    begun = from_dict(RunConfig, model.provenance["config"])
    knows = bool(config.lead.classifier)
    plan = build_diffusion.checked_plan(sampling, begun, model.denoiser.schedule, led=knows)
    model = led(model, config.lead, plan)
    batches = -(-config.num_images // sampling.batch_size)
    line, film, seen = ProgressLine("step"), Film(), itertools.count(1)

    def show(t: int, x_t: Any, x_0: Any) -> None:
        line(next(seen), batches * (len(plan.steps) - 1))
        if config.film:
            film.add(t, x_t, x_0)

    images = model.draw(plan, config.num_images, sampling.batch_size, show)
    grid(images).save(arguments.out)
    if config.film:
        film.save(config.film, images)
    provenance = {key: model.provenance[key] for key in ("checkpoint", "step", "weights_sha256")}
    return {"picture": arguments.out, "num_images": config.num_images, **provenance}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", SampleConfig, sample, "model_uri", "--out"))
