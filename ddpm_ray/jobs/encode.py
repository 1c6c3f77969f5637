"""Encode a packed data set to latents, or to embeddings of its images.

    ddpm-ray encode MODEL DATA DESTINATION [key=value ...]
    python jobs/encode.py MODEL DATA DESTINATION [key=value ...]

MODEL is a run with task=autoencoder or task=contrastive, one of its checkpoints, or a diffusers
folder of an AutoencoderKL. DATA is a packed data set. DESTINATION receives each image's label, key
and captions with its encoding: of an autoencoder the posterior's mean and log variance, on which
training is cheaper than on pixels; of a contrastive model the image's embedding (docs/text.md). It
names the model by its sha256. The same command continues an interrupted job; finished shards are
kept.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url, require_folder
from ddpm_ray.config.jobs.encode import EncodeConfig


def prepare(config: EncodeConfig, arguments: Namespace) -> EncodeConfig:
    """Make the paths absolute. Raises ConfigError for local ones that cannot be read or written."""
    for name in ("model", "data"):
        setattr(arguments, name, require_folder(name, getattr(arguments, name)))
    arguments.destination = output_url(
        "destination", arguments.destination, home_folder(), data_set=True
    )
    return config


def encode_images(config: EncodeConfig, arguments: Namespace) -> dict[str, Any]:
    """Encode the images; return a description of the new data set and the speed."""
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.runs.encode import encode_dataset  # heavy: after the paths are checked
    from ddpm_ray.runs.encode_report import encoding_lines, encoding_summary

    places = arguments.model, arguments.data, arguments.destination
    result = encode_dataset(*places, config, ProgressLine("images"))
    for line in encoding_lines(result):
        print(line, file=sys.stderr)
    return encoding_summary(result)


ARGUMENTS = (
    Argument("model", "folder or fsspec URL of a run or checkpoint, or a diffusers folder"),
    Argument("data", "folder or fsspec URL of the packed images"),
    Argument("destination", "folder or fsspec URL of the encoded data set"),
)
JOB = Job("encode", __doc__ or "", EncodeConfig, encode_images, ARGUMENTS, prepare, continues=True)
