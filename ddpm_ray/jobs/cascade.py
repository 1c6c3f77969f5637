"""Join a prior, a decoder and upsamplers to one model that draws images of prompts.

    ddpm-ray cascade --out FOLDER prior=RUN decoder=RUN "upsamplers=[RUN]"
    python jobs/cascade.py --out FOLDER prior=RUN decoder=RUN "upsamplers=[RUN]"

FOLDER gets cascade.json, which names the newest checkpoint of each run by URL and sha256; the
models stay where they are. `ddpm-ray sample FOLDER` and `ddpm_ray.load_cascade(FOLDER)` draw from
it. Prior and decoder must be trained with the same encoder, and each upsampler must enlarge images
of the size that the model before it draws.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.cascade import CascadeConfig


def prepare(config: CascadeConfig, arguments: Namespace) -> CascadeConfig:
    """Return `config` with absolute paths."""
    from ddpm_ray.storage import object_store  # fsspec: after the config is read

    home = home_folder()
    arguments.out = object_store.absolute(arguments.out, home)
    return replace(
        config,
        prior=object_store.absolute(config.prior, home),
        decoder=object_store.absolute(config.decoder, home),
        upsamplers=tuple(object_store.absolute(one, home) for one in config.upsamplers),
    )


def join_models(config: CascadeConfig, arguments: Namespace) -> dict[str, Any]:
    """Write the cascade, once its models load and fit; return its folder and its parts."""
    from ddpm_ray.assembly.cascades import write_cascade  # heavy: after the config is read

    models = config.prior, config.decoder, config.upsamplers
    return {
        "cascade": arguments.out,
        **write_cascade(arguments.out, *models, config.candidates),
    }


ARGUMENTS = (Argument("--out", "folder or fsspec URL to write cascade.json to"),)
JOB = Job("cascade", __doc__ or "", CascadeConfig, join_models, ARGUMENTS, prepare)
