"""Encode a packed data set to latents, on which training is cheaper than on pixels.

    ddpm-ray encode AUTOENCODER DATA DESTINATION [key=value ...]
    python jobs/encode.py AUTOENCODER DATA DESTINATION [key=value ...]

AUTOENCODER is a run with task=autoencoder, one of its checkpoints, or a diffusers folder of an
AutoencoderKL. DATA is a packed data set. DESTINATION receives the posterior's mean and log variance
of each image, its label and its key, and the autoencoder's sha256. The same command continues an
interrupted job; finished shards are kept.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url, require_folder
from ddpm_ray.config.jobs.encode import EncodeConfig


def prepare(config: EncodeConfig, arguments: Namespace) -> EncodeConfig:
    """Make the paths absolute. Raises ConfigError for local ones that cannot be read or written."""
    for name in ("autoencoder", "data"):
        setattr(arguments, name, require_folder(name, getattr(arguments, name)))
    arguments.destination = output_url(
        "destination", arguments.destination, home_folder(), data_set=True
    )
    return config


def encode_images(config: EncodeConfig, arguments: Namespace) -> dict[str, Any]:
    """Encode the images; return a description of the latents and the speed."""
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.runs.encode import (  # heavy: after the paths are checked
        encode_dataset,
        encoding_lines,
        encoding_summary,
    )

    places = arguments.autoencoder, arguments.data, arguments.destination
    result = encode_dataset(*places, config, ProgressLine("images"))
    for line in encoding_lines(result):
        print(line, file=sys.stderr)
    return encoding_summary(result)


ARGUMENTS = (
    Argument("autoencoder", "folder or fsspec URL of its run or checkpoint, or a diffusers folder"),
    Argument("data", "folder or fsspec URL of the packed images"),
    Argument("destination", "folder or fsspec URL of the latents"),
)
JOB = Job("encode", __doc__ or "", EncodeConfig, encode_images, ARGUMENTS, prepare, continues=True)
