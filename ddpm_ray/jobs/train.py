"""Train a diffusion model on Ray, or continue the run of that name.

    ddpm-ray train digits [key=value ...]
    python jobs/train.py conf/train/digits.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/train.py conf/train/digits.yaml

The same command continues an interrupted run from its last checkpoint. Ctrl-C once commits a
checkpoint and exits; twice exits at once. SIGTERM and SIGHUP (a closed terminal) count as Ctrl-C.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import CONFIG, InterruptedRunError, Job
from ddpm_ray.cli.paths import home_folder, require_folder
from ddpm_ray.config.run import RunConfig
from ddpm_ray.jobs.unused_options import warn_of_unused
from ddpm_ray.reporting import Progress


def train(config: RunConfig, _: Namespace) -> dict[str, Any]:
    """Train, print where the results are on stderr, and return the report."""
    warn_of_unused(config)
    _require_data(config)
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.runs.train import run_training  # heavy: after the config is checked
    from ddpm_ray.tracking.tracking_uri import way_to_see

    budget = round(config.training.core_seconds)
    line = ProgressLine("core-second" if budget else "step")

    def show(p: Progress) -> None:
        """Show steps, or core-seconds where they end the run."""
        note = f"loss {p.loss:.4f}  {p.images_per_s:.0f} images/s"
        if budget:
            line(min(budget, round(p.core_seconds)), budget, f"step {p.step}  {note}")
        else:
            line(p.step, p.steps, note)

    outcome = run_training(config, home_folder(), show)
    report = outcome.report
    if not outcome.finished:
        raise InterruptedRunError(
            f"stopped at step {report['step']} of {report['steps']}, checkpoint committed in "
            f"{report['checkpoint']}; the same command continues"
        )
    no_pictures = "none: training.grid_every_steps is 0"
    if not (config.traits.draws_images or config.traits.reconstructs):
        no_pictures = f"none: {config.traits.name} draws no images"
    scores = "  ".join(f"{key} {value:.4g}" for key, value in report["metrics"].items())
    print(
        f"checkpoint   {report['checkpoint']}",
        f"{'pictures    ' if config.traits.reconstructs else 'samples     '} "
        f"{report['samples'] or no_pictures}",
        f"denoising    {report['denoising'] or 'none'}",
        f"scores       {scores or 'none: evaluation.num_images is 0'}",
        f"MLflow run   {report['run_id']} in {report['tracking_uri']}",
        f"to see it    {way_to_see(report['tracking_uri'], report['page'])}",
        sep="\n",
        file=sys.stderr,
    )
    return report


def _require_data(config: RunConfig) -> None:
    """Raise ConfigError for a local folder of data that does not exist, before Ray is imported."""
    wanted = config.evaluation
    urls = {"evaluation.held_out_url": wanted.held_out_url}
    urls["evaluation.reference_url"] = wanted.reference_url
    if not config.data.source:  # else the folder is made
        urls["data.url"] = config.data.url
    for key, url in urls.items():
        if url:
            require_folder(key, url, "pack images there with `ddpm-ray pack`, or name another")
    if url := config.embedding.url:
        remedy = "encode the images there with `ddpm-ray encode`, or name another"
        require_folder("embedding.url", url, remedy)


JOB = Job("train", __doc__ or "", RunConfig, train, (CONFIG,), continues=True)
