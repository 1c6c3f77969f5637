"""Join a prior, a decoder and upsamplers to one model that draws images of prompts.

    ddpm-ray cascade --out FOLDER prior=RUN decoder=RUN "upsamplers=[RUN]"
    python jobs/cascade.py --out FOLDER prior=RUN decoder=RUN "upsamplers=[RUN]"

FOLDER gets cascade.json, which names the newest checkpoint of each run by URL and sha256; the
models stay where they are, unless copies=true. `ddpm-ray sample FOLDER`, `ddpm-ray evaluate FOLDER`
and `ddpm_ray.load_cascade(FOLDER)` take it; register_as=NAME makes it a model in MLflow, too. Prior
and decoder must be trained with the same encoder, and each upsampler must enlarge images of the
size that the model before it draws.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url
from ddpm_ray.config.jobs.cascade import CascadeConfig


def prepare(config: CascadeConfig, arguments: Namespace) -> CascadeConfig:
    """Return `config` with absolute paths."""
    from ddpm_ray.storage import object_store  # fsspec: after the config is read

    home = home_folder()
    arguments.out = output_url("--out", arguments.out, home)
    return replace(
        config,
        prior=object_store.absolute(config.prior, home),
        decoder=object_store.absolute(config.decoder, home),
        upsamplers=tuple(object_store.absolute(one, home) for one in config.upsamplers),
    )


def join_models(config: CascadeConfig, arguments: Namespace) -> dict[str, Any]:
    """Write the cascade, once its models load and fit; return its folder and its parts."""
    from ddpm_ray.runs.make_cascade import make_cascade  # heavy: after the config is read

    return make_cascade(arguments.out, config, home_folder())


ARGUMENTS = (Argument("--out", "folder or fsspec URL to write cascade.json to"),)
JOB = Job("cascade", __doc__ or "", CascadeConfig, join_models, ARGUMENTS, prepare)
