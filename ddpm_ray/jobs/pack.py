"""Pack images into the shards that training reads.

    ddpm-ray pack SOURCE DESTINATION [key=value ...]
    python jobs/pack_shards.py SOURCE DESTINATION [key=value ...]

SOURCE is a folder of images (flat, one sub-folder per class, or with a metadata.csv), WebDataset
tars or Parquet or Arrow files with a column of images (a folder or one file), or one of digits,
mnist, fashion-mnist and cifar10. Captions come from captions.tsv or .jsonl, metadata.csv, text
files next to the images, members of tars or a column. docs/packing.md says which files are packed,
left out or refused.
The last lines on stderr and the result list every file that was not packed, the number of samples
and the classes. The same command continues after an interruption: finished shards are kept.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.loading import ConfigError


def prepare(config: PackConfig, arguments: Namespace) -> PackConfig:
    """Return `config`; make the destination absolute.

    Raises ConfigError if it is not writable, or if the source is no folder, tar or table.
    """
    from ddpm_ray.data.dataset import DatasetError
    from ddpm_ray.data.packing import source_files
    from ddpm_ray.data.packing.builtin_datasets import NAMES
    from ddpm_ray.storage import object_store  # fsspec: after the config is read

    source = object_store.absolute(arguments.source, Path.cwd())
    if arguments.source not in NAMES and object_store.is_local(source):
        try:
            source_files.require_source(source)
        except DatasetError as error:
            raise ConfigError(f"source is {error}") from None
    arguments.destination = output_url(
        "destination", arguments.destination, home_folder(), data_set=True
    )
    return config


def pack(config: PackConfig, arguments: Namespace) -> dict[str, Any]:
    """Pack the source, and return what the data set is and which files are not in it."""
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.data.packing import pack_report
    from ddpm_ray.runs.pack import pack_dataset  # heavy: after the config is checked

    places = arguments.source, arguments.destination
    packed = pack_dataset(*places, config, ProgressLine("shards"))
    for line in pack_report.lines(*packed):
        print(line, file=sys.stderr)
    return pack_report.job_result(*packed)


ARGUMENTS = (
    Argument("source", "images to pack: a folder, a file, or the name of a data set"),
    Argument("destination", "folder or fsspec URL of the shards"),
)
JOB = Job("pack", __doc__ or "", PackConfig, pack, ARGUMENTS, prepare, continues=True)
